"""The run folder, the hand-over between training and everything after it."""
