"""Small hand-written networks, one per tricky pattern, each with its own masked reference."""
