"""Scores of predictions, by NumPy and scikit-learn."""
