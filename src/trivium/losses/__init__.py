"""The mathematics, per item, never reduced."""
