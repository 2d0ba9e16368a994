"""Teach a causal language model to prefer, or avoid, chosen tokens."""
