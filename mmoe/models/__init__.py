"""Defines the model: what has trainable parameters, and the operations of its forward pass."""
