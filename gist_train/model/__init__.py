"""Encoder, guide and loss."""
