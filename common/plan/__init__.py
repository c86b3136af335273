"""Serve, cache or compute in process: what each costs."""
