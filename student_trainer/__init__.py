"""Everything that trains or judges an encoder."""
