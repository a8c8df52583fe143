"""What a run leaves behind; no torch."""
