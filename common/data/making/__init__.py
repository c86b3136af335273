"""Making data sets: what only ``salt-data`` does."""
