"""Says what a run will take before it runs: memory, traffic, operations, data."""
