"""What an algorithm may import: hooks, types, mathematics; and the training step that calls the hooks."""
