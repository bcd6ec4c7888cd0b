"""From a name to packed experts: each kind of checkpoint, checked before any of it is read."""
