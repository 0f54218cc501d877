"""Brings weights in and out: Hugging Face folders, other runs, dense models that get experts."""
