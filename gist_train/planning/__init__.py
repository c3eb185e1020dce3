"""A config -> what training will do, without training."""
