"""Read bytes by address, near or far, with retries and a cache; knows nothing of what they mean."""
