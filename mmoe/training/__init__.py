"""Trains a run: its folder, state, steps and callbacks."""
