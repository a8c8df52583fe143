"""A number for a completion: learned, verifiable, by a constitution or a judge."""
