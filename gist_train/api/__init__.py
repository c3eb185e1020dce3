"""What Python programs and notebooks call."""
