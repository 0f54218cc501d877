"""Defines the optimizers, learning rates and their schedules, and the arithmetic of batches."""
