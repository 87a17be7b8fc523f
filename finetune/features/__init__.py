"""What the frozen trunk says of an image: features, the probe and the neighbours."""
