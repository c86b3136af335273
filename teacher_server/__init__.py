"""The frozen teacher as a service."""
