"""Spreads a run over processes, by data, tensor, expert, context and pipeline."""
