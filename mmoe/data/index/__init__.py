"""Write and read shards with their indices: which samples there are, and where their bytes lie; decodes nothing."""
