"""Full fine-tuning against LoRA: what an adapter loses, and what it saves."""
