"""Target caches: verify, repair, gc, and writing their files."""
