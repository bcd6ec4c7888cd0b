"""How the pool holds an expert's weights: a file per kind of format, and where each number lies."""
