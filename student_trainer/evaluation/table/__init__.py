"""Tables of finished runs: theirs, and the paper's with their numbers."""
