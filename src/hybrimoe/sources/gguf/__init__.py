"""GGUF files: their header, which tensors are experts, and the model around them."""
