"""What is wrong with training rows, by the guide's embeddings and by the texts themselves."""
