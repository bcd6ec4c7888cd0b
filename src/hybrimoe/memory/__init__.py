"""What a model takes on this machine, where it would lie, and how fast it would be."""
