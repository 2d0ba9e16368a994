"""Where LoRA goes, its variants, and the set head on the output embedding."""
