"""The fine-tuning attack: its flags, its runs, what they show together."""
