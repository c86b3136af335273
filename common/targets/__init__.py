"""Teacher targets as bytes: dtypes, requests, files of a cache."""
