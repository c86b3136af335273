"""Where targets come from: a service, a cache, or a teacher in process."""
