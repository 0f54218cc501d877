"""Holds the parts of the simulated drive: its world, the driver, the pictures and the other sensors."""
