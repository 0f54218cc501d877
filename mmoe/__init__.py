"""Pre-training of multimodal dense and mixture-of-experts models."""
