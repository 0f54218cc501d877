"""Runs processes together: launch, agreement, memory, and watching for hangs."""
