"""Says which part of a model computes in which number format."""
