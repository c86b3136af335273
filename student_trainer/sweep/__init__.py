"""Several students of one teacher on one Ray."""
