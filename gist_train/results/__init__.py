"""What a checkpoint is worth, and the model folder that is handed on."""
