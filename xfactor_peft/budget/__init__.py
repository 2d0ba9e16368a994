"""How much memory and time a run takes, predicted before anything is loaded, and how to keep it inside a budget.

- `options`: what the user says: `--checkpointing`, `--memory-budget`
- `dry_run`: the model on the meta device, and the bytes that a training step saves for backward
- `memory_model`: peak memory from these
- `time_probe`: seconds a step from one block that is really run
- `plan`: both together, against what this machine has, with the flags that would make it fit
"""
