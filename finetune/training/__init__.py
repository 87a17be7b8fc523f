"""From a plan to a trained model: assembly, the loop, checkpoints."""
