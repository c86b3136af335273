"""What a request passes: listener, access, limits, routes, answer."""
