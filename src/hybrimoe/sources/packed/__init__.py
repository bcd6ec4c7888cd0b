"""Folders that `save_packed` wrote: the manifest, packed experts and packed dense layers."""
