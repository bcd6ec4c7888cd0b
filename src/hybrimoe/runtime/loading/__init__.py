"""From a name or a folder to packed experts: checks, headers, packing on arrival, packed files."""
