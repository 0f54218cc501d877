"""Pre-training of multimodal dense and mixture-of-experts models."""

__version__ = "0.1.0"  # read by pyproject.toml
