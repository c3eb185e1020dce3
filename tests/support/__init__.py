"""What tests share: tiny models and data, runs, stand-ins for what is not there."""
