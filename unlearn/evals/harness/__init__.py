"""lm-eval's tasks on a live model: their files, their requests, the model that answers."""
