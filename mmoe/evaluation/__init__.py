"""Measures a run on held-out data, and samples from it."""
