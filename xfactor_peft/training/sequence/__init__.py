"""The sequence-level phase: policies that plan whole texts."""
