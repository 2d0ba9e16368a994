"""How much memory and time a run takes, predicted before anything is loaded, and how to keep it inside a budget."""
