"""Networks by name: heads, stages, freezing and weights."""
