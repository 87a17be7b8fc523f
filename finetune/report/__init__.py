"""What people look at: charts of a run."""
