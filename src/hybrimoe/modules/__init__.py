"""What stands in a wrapped model in place of its own modules, and what protects it there."""
