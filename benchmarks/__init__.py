"""Side-by-side measurements: multifire, its reference, and other frameworks on the same network."""
