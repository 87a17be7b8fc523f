"""The networks of the literature, built from their published layer tables."""
