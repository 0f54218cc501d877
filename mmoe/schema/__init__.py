"""Define what several rooms speak of: samples, batches, counts, manifests, bounds; may know the config room only."""
