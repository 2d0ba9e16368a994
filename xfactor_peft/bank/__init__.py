"""Adapters in memory: swapped, mixed, merged, verified."""
