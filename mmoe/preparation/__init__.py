"""Turns raw recordings into prepared sources, offline; only `reporting` and `commands` may import it, no trainer."""
