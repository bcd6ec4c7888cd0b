"""What this machine's CPU, GPU and link take for an expert: measured, fitted, kept."""
