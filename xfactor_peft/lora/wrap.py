"""Where LoRA goes: attention and MLP projections of any transformer, found by name and type."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..base.quantised import quantized_layers, quantized_types
from ..errors import XFactorError
from ..lowmem.linears import below_block, counted, in_block, is_linear, listed, other_weights
from ..lowmem.noise import without_notes
from ..lowmem.peft_layers import custom_modules
from ..options import LoraOptions
from .set_head import freeze_block_biases, head_name, with_set_head
from .variants import remember_start

_PARTS = ("attention", "mlp")
_ATTENTION = re.compile(r"(^|[._])(attn|attention|self_attention)([._]|$)")
_MLP = re.compile(r"(^|[._])(mlp|ffn|feed_forward|fc\d|fc_in|fc_out|w[123])([._]|$)")


def projections(model: PreTrainedModel, target: str) -> list[str]:
    """Full names of the linear layers in the blocks that `target` means.

    A layer belongs to attention or to the MLP by the names on its path below the block's number, e.g.
    `attn.c_proj` and `mlp.c_proj` of GPT-2, `self_attn.q_proj` of Llama, `fc1` of OPT. Input and output
    embeddings are never included.

    Raises:
        XFactorError: nothing matches.
    """
    names = [name for name in _linear_layers(model) if _part(name) in (_PARTS if target == "all" else (target,))]
    if not names:
        left = listed(_without_lora(model, target, names))
        others = f"; there is no LoRA for {left}" if left else ""
        raise XFactorError(
            f"`lora.target={target}` matches no layer of {type(model).__name__}; nothing could be trained{others}"
        )
    return names


def unmatched_modules(model: PreTrainedModel, target: str) -> dict[str, int]:
    """What `target` means, or could mean, and no LoRA reaches, e.g. {"mlp.experts.gate_up_proj": 24}.

    Weights of attention or MLP that are in no linear layer (stacked experts, routers), and with "all" every other
    layer of the blocks (a state-space mixer's).
    """
    blocks = LoraOptions(target=target).blocks
    return _without_lora(model, blocks, projections(model, blocks)) if blocks else {}


def _without_lora(model: PreTrainedModel, target: str, names: list[str]) -> dict[str, int]:
    taken = {f"{name}.weight" for name in names}
    left = (name for name in other_weights(model, ()) if name not in taken and ".lora_" not in name)
    meant = (name for name in left if target == "all" or _part(name) == target)
    return counted(name.removesuffix(".weight") for name in meant)


def _part(name: str) -> str | None:
    """ "attention" or "mlp" by the names on the path below the block; None for neither."""
    inside = below_block(name)
    return "attention" if _ATTENTION.search(inside) else "mlp" if _MLP.search(inside) else None


def _linear_layers(model: PreTrainedModel) -> Iterator[str]:
    """Names of the blocks' linear layers, quantised ones too."""
    head, quantised = model.get_output_embeddings(), tuple(quantized_types())
    for name, module in model.named_modules():
        if module is not head and in_block(name) and (isinstance(module, quantised) or is_linear(module)):
            yield name


def matched_modules(model: PreTrainedModel, target: str) -> dict[str, int]:
    """How many layers each target name matched, e.g. {"attn.c_attn": 24, "attn.c_proj": 24}."""
    options = LoraOptions(target=target)
    counts = counted(iter(projections(model, options.blocks) if options.blocks else []))
    return {**counts, head_name(model): 1} if options.head else counts


def lora_config(
    model: PreTrainedModel, options: LoraOptions, sets: int = 0, only: Sequence[str] | None = None
) -> LoraConfig:
    """PEFT's configuration for these options, with the target modules as path suffixes.

    `sets` is the rank of the set head, needed when `options.head`; `only` names layers in place of all those that
    `options.target` means in the blocks.
    """
    matched = projections(model, options.blocks) if options.blocks else []
    targets = sorted(only) if only is not None else sorted({below_block(name) for name in matched})
    if options.head:
        if sets < 1:
            raise XFactorError(
                f"`lora.target={options.target}` needs a rate: give `goal.rate`, `goal.strength` or `goal`"
            )
        targets.append(head_name(model))
    conv1d = any(isinstance(m, Conv1D) for m in model.modules())
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        fan_in_fan_out=conv1d,
        bias="none",
        use_dora=options.variant == "dora",
        use_rslora=options.variant == "rslora",
        init_lora_weights="pissa" if options.variant == "pissa" else True,
    )
    return with_set_head(config, head_name(model), sets) if options.head else config


def register_layers(config: LoraConfig) -> LoraConfig:
    """Let `config` make this package's LoRA layers, which run as one autograd function (see `lowmem.peft_layers`).

    Adapter files and every call of PEFT stay the same; call it before the configuration meets a model.
    """
    config._register_custom_module(custom_modules())  # type: ignore[arg-type]  # PEFT calls them, classes or not
    return config


def add_lora(
    model: PreTrainedModel, options: LoraOptions, sets: int = 0, only: Sequence[str] | None = None
) -> PeftModel:
    """Wrap `model` in place with a new trainable adapter (see `lora_config`); everything else is frozen.

    Raises:
        XFactorError: DoRA or PiSSA on quantised layers, which hold no weights to decompose; a matched layer that PEFT
            left as it was.
    """
    if options.variant in ("dora", "pissa") and quantized_layers(model):
        raise XFactorError(f"`lora.variant={options.variant}` needs the base unquantised; drop `quantization`")
    wanted = set(only if only is not None else projections(model, options.blocks) if options.blocks else ())
    with without_notes():
        wrapped = get_peft_model(model, register_layers(lora_config(model, options, sets, only)))
    if left := sorted(name for name in wanted if not isinstance(model.get_submodule(name), LoraLayer)):
        raise XFactorError(
            f"PEFT puts no LoRA on {left[0]} of {type(model).__name__}, whose name it takes for stacked experts; "
            "use `lora.target=attention`"
        )
    freeze_block_biases(wrapped)
    if options.variant == "pissa":
        remember_start(wrapped)
    return wrapped


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """`disable_adapter`, which on leaving makes every adapter weight trainable again, but frozen ones stay frozen."""
    frozen = [p for name, p in model.named_parameters() if "lora_" in name and not p.requires_grad]
    with model.disable_adapter():
        yield
    for parameter in frozen:
        parameter.requires_grad_(False)


def remove_lora(model: PreTrainedModel) -> None:
    """Undo `add_lora` in place: every layer is the model's own again, and what was trained is gone."""
    for name, layer in [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]:
        model.set_submodule(name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def adapts_trunk(model: PreTrainedModel) -> bool:
    """Whether an active adapter changes the states, and not only, as a set head does, the logits made from them."""
    head = model.get_output_embeddings()
    layers = (module for module in model.modules() if isinstance(module, LoraLayer) and module is not head)
    return any(not layer.disable_adapters and set(layer.active_adapters) & set(layer.lora_A) for layer in layers)


def trainable_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
