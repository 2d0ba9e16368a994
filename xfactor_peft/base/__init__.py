"""The base model: found, loaded, identified, split into trunk and output embedding."""
