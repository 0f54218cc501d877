"""Records what a run does, step by step, and reads the records back."""
