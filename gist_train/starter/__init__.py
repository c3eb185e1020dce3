"""gist-train init: the user's own files -> a first config."""
