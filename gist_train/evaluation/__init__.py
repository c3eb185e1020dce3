"""What a model is worth: tasks, what they measure, and the scores on disk."""
