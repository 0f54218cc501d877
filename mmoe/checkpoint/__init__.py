"""Saves a run's state so that a crash loses nothing, and loads it under any layout."""
