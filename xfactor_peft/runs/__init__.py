"""A run in a folder: from its first line to the adapter in its place."""
