"""Adapter files changed by hand, and the logits that an adapter gives."""

import json

import torch
from safetensors.torch import load_file, save_file

IDS = torch.arange(12)[None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def edit_weights(change):
    def apply(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return apply


def edit_config(**values):
    def apply(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def first(tensors):
    return next(iter(sorted(tensors)))
