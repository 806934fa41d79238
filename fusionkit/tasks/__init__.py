"""What a task is: its rows, how a model is called and scored on them, how it is fine-tuned."""
