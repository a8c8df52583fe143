"""What people look at: read-only on runs."""
