"""The `hybrimoe` command, a file per group of commands."""
