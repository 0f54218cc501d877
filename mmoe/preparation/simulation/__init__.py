"""Holds the parts of the simulated drive: its world, the driver, the images and the other sensors."""
