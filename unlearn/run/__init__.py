"""A run's life: its folder, its checkpoints and log, being told to stop, and going on."""
