"""The criteria, and slow twins of them."""
