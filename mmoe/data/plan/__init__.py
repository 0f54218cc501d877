"""Decide order, mixture and packing from the indices alone, before anything is decoded; every rank plans the same."""
