"""An adapter merged into the GGUF file it was trained on: other tensors and all fields stay the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..adapters.factors import Factors, mixed_factors
from ..adapters.mix import Mix
from ..bank.bank import AdapterBank
from ..bank.state_fold import fold_by_states
from ..base.gguf import load_gguf
from ..base.gguf_tokenizer import open_gguf
from ..base.split_model import SplitModel, split
from ..errors import XFactorError
from ..lora.set_head import head_name
from ..lowmem.gguf_file import GgufFile, PackedTensor
from ..lowmem.gguf_formats import BY_NAME
from ..options import EvalOptions, SamplingOptions
from ..sampling.metrics import evaluate
from ..tokens.ends import special_ids
from ..tokens.token_set import TokenSet
from .gguf_copy import copy_gguf, packed
from .gguf_lora import arranged, tensor_names

TENSORS = ("same", "f16")
"""What touched tensors are packed as: the type that they had, or F16."""
_MEASURED = EvalOptions(repeats=1, sampling=SamplingOptions(max_new_tokens=32))


def merge_into_file(bank: AdapterBank, mix: Mix, output: Path, tensors: str) -> str:
    """W + sum_i w_i s_i B_i A_i for every tensor that the adapters touch, packed again; its rows that they leave alone
    stay as they are. A set head on a tied output embedding gets an `output.weight` of its own.

    Packing rounds: what it costs, KL(adapter || written file) on the adapter's own texts, is in the line returned.

    Raises:
        XFactorError: a layer or a bias has no place in the file, or a package that packs a tensor's type is missing.
    """
    if tensors not in TENSORS:
        raise XFactorError(f"`tensors` is one of {', '.join(TENSORS)}, not {tensors!r}")
    base = bank.base
    assert base.choice.gguf is not None
    source, model = open_gguf(base.choice.gguf), base.model
    names = tensor_names(model)
    bank.use(mix)
    infos, notes = [bank.adapters[name] for name in mix.names], list[str]()
    factors = mixed_factors(infos, [weight for _, weight in mix.parts])
    head = head_name(model)
    changed: dict[str, PackedTensor] = {}
    for name, layer in factors.items():
        if name not in names:
            raise XFactorError(f"{base.choice.name} has no tensor for {name}")
        update = layer.b @ layer.a
        if layer.bias is not None and layer.bias.any():
            update += _folded(bank, name == head, name, layer, notes)
        tensor = _tensor(source, f"{names[name]}.weight")
        changed[tensor.name] = _updated(tensor, arranged(model, f"{name}.weight", update), tensors)
    copy_gguf(source, output, changed)
    kinds = ", ".join(sorted({tensor.form.name for tensor in changed.values()})) or "nothing"
    return "; ".join(
        [f"{output}: {len(changed)} of {len(source.tensors)} tensors changed ({kinds}), merged {mix}", *notes,
         _cost(bank, mix, output)]
    )  # fmt: skip


def _folded(bank: AdapterBank, head: bool, name: str, layer: Factors, notes: list[str]) -> torch.Tensor:
    """A set head's constant offset as an update of the output embedding's rows (see `state_fold`)."""
    assert layer.bias is not None
    if not head:
        raise XFactorError(f"a GGUF file has no place for the bias of {name}; export as logit-bias instead")
    fold = fold_by_states(bank.base, layer.bias)
    notes.append(fold.describe())
    return torch.outer(layer.bias, fold.direction.float())


def _tensor(source: GgufFile, name: str) -> PackedTensor:
    """The file's tensor; a tied output embedding is a copy of the input one."""
    found = source.tensors.get(name)
    if found is None:
        tied = source.tensors["token_embd.weight"]
        found = PackedTensor(name, tied.form, tied.shape, tied.data)
    return found


def _updated(tensor: PackedTensor, update: torch.Tensor, tensors: str) -> PackedTensor:
    """The tensor with its update, (out, in) in the file's order."""
    form = tensor.form if tensors == "same" else BY_NAME["F16"]
    new = packed(tensor, tensor.unpacked(torch.float32) + update, form)
    if form is tensor.form:
        touched = update.any(1)
        new.data[~touched] = tensor.data[~touched]
    return new


@torch.no_grad()
def _cost(bank: AdapterBank, mix: Mix, output: Path) -> str:
    base, written = bank.base, load_gguf(open_gguf(output), bank.base.model.dtype)
    tokens = next((found for name in mix.names if (found := bank.token_set(name)) is not None), None)
    ordinary = next(i for i in range(base.vocab_size) if i not in special_ids(base.tokenizer, base.model))
    known = tokens or TokenSet.token_ids(base.tokenizer, [ordinary], vocab_size=base.vocab_size)  # of any set
    policy, other = split(base.model), SplitModel(written)
    scores: Any = evaluate(policy, base.tokenizer, known, _MEASURED, base=other)
    low, high = scores.kl_interval
    return f"packing costs KL {scores.kl_from_base:.2g} ({low:.2g} to {high:.2g}) nats/token on its own texts"
