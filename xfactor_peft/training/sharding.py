"""Weights, gradients and moments sharded over the processes: FSDP2 of torch.

`fully_shard` (Zhao et al. 2023, arXiv:2304.11277, in its per-parameter form) keeps 1/N of every tensor in each of N
processes and gathers a block's weights just before they are needed. It cannot be undone in place, so a copy of the
model's modules is sharded, which shares the parameters until then; when training is done the model gets them back.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from ..base.loading import Base
from ..errors import XFactorError
from ..lowmem.activations import checkpointed_blocks
from ..objective.targets import Target
from ..options import Recipe
from .parallel import process


def check_shards(base: Base, target: Target, recipe: Recipe) -> None:
    """Raises XFactorError for what a sharded copy cannot do.

    Codes are not sharded, variants of LoRA look at whole weights, and the copy's adapter cannot be switched off.
    """
    if base.quantized:
        raise XFactorError("`fsdp=True` shards weights that are not quantised; drop `quantization`")
    if recipe.train.method == "lora" and recipe.lora and recipe.lora.variant != "lora":
        raise XFactorError(f"`fsdp=True` is for plain LoRA; got `lora.variant={recipe.lora.variant}`")
    if target.needs_teacher(recipe.objective):
        raise XFactorError("`fsdp=True` has no base to compare with; a rate and `kl_to_base` need it off")


class ShardedCopy:
    """A model's modules once more, over the same parameters, for `shard`.

    Attributes:
        model: the copy, which is trained.
    """

    def __init__(self, whole: PreTrainedModel) -> None:
        self._whole = whole
        self.model: PreTrainedModel = copy.deepcopy(whole, {id(p): p for p in whole.parameters()})

    def shard(self, objective: nn.Module, device: torch.device) -> None:
        """Shard every block, then what is left of `objective`, which holds the copy; the model's own are emptied."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard  # 30 MB that no other run needs

        mesh = init_device_mesh(device.type, (process()[1],))
        for block in checkpointed_blocks(self.model):
            fully_shard(block, mesh=mesh)
        fully_shard(objective, mesh=mesh)
        for parameter in self._whole.parameters():
            parameter.data = parameter.data.new_empty(1).expand(parameter.shape)  # the shape without the memory

    @torch.no_grad()
    def gather(self) -> None:
        """Give the trained weights back to the model, whole, in every process."""
        trained = dict(self.model.named_parameters())
        for name, parameter in self._whole.named_parameters():
            parameter.data = whole_tensor(trained[name].detach())


def whole_tensor(value: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered from all processes; any other as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
