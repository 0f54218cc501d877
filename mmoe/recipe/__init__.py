"""Puts the config of a run together from those of the rooms."""
