"""Programs that a model wrote, run apart."""
