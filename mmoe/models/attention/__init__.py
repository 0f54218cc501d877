"""Provides grouped-query attention, and the backends that apply the attention rule to a packed batch, one a file."""
