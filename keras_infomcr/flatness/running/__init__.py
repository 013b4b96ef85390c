"""What all measures share while they run."""
