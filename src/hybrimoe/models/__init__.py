"""What hybrimoe knows of a transformers model: its experts, gates, routers, norms and bytes."""
