"""The tier stack: what is where, what to move, and the moving."""
