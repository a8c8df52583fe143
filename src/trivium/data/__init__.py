"""Raw text to tokens."""
