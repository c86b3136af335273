"""What replicas and students share: runs, groups, counters."""
