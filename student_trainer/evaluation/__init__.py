"""What a trained encoder is worth: everything behind ``salt-eval``."""
