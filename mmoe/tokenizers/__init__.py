"""Turns raw signals into ids and vectors."""
