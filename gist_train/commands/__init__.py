"""What each command of the line takes, does and prints."""
