"""The YAML of a run: what may stand in it (`schema`), and reading it (`loading`)."""
