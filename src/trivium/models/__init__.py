"""The network: knows no text, no loss, no rank."""
