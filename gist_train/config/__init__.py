"""The YAML of a run: what may be in it (`schema`), and reading it (`loading`)."""
