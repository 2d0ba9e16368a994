"""A training run: its phases, the loop, the optimisers, several processes."""
