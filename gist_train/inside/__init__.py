"""The loss and the packed forward inside sentence-transformers' own trainer and models."""
