"""Files that are whole or not there, one run a folder, a run's state and how signals stop it."""
