"""Reads configs: strict trees from YAML, with overrides, and a sentence for every fault."""
