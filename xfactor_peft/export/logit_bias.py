"""A constant bias on the logits of the set, in the form that servers take: {"logit_bias": {"id": value}}.

`logit_bias` is the parameter of requests, in OpenAI's interface and in llama.cpp's server; `arguments` are the same for
llama.cpp's programs: `--logit-bias ID+VALUE`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from ..adapters.mix import Mix
from ..bank.bank import AdapterBank
from ..base.split_model import split
from ..errors import XFactorError
from ..options import EvalOptions
from ..sampling.frontier import measure_frontier
from ..sampling.metrics import evaluate


def write_logit_bias(bank: AdapterBank, mix: Mix, output: Path, options: EvalOptions = EvalOptions()) -> str:
    """Exact where the adapters are nothing but set heads with a constant offset; otherwise fitted.

    Fitted means one lambda for the whole set, at which samples of the base hold as much of it as samples of the
    adapter. It matches R and nothing else that the adapter has learnt; the file says which of the two it is.

    Raises:
        XFactorError: no token set is known, or no finite bias gives the adapter's R.
    """
    offsets = exact_offsets(bank, mix)
    if offsets is not None:
        values: dict[str, Any] = {"kind": "exact"}
    else:
        offsets, values = _fitted(bank, mix, options)
    chosen = offsets.nonzero().flatten().tolist()
    record = {
        **values,
        "adapter": str(mix),
        "base": bank.base.identity.record(),
        "logit_bias": {str(i): round(float(offsets[i]), 6) for i in chosen},
        "arguments": [word for i in chosen for word in ("--logit-bias", f"{i}{float(offsets[i]):+.6g}")],
    }
    output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    about = "exactly the adapter" if record["kind"] == "exact" else f"fitted at R {record['rate']:.4f}"
    return f"{output}: {len(chosen)} tokens, {about}"


def exact_offsets(bank: AdapterBank, mix: Mix) -> torch.Tensor | None:
    """b on its sets, (V,), where it is all that the adapters do; None where they do more."""
    total = torch.zeros(bank.base.vocab_size)
    head = bank.base.model.get_output_embeddings()
    for name, weight in mix.parts:
        peft_name = bank.peft_names[name]
        layers = [m for m in bank.base.model.modules() if isinstance(m, LoraLayer) and peft_name in m.lora_A]
        if layers != [head] or head.lora_A[peft_name].weight.any() or head.lora_B[peft_name].bias is None:
            return None
        bank.use(name)  # scaling as trained
        total += weight * head.scaling[peft_name] * head.lora_B[peft_name].bias.detach().float().cpu()
    return total


def _fitted(bank: AdapterBank, mix: Mix, options: EvalOptions) -> tuple[torch.Tensor, dict[str, Any]]:
    sets = {tokens.hash: tokens for name in mix.names for tokens in bank.token_sets(name)}
    if len(sets) != 1:
        raise XFactorError(f"{mix} has {len(sets)} token sets; a bias can be fitted to exactly one")
    tokens = next(iter(sets.values()))
    split_model, tokenizer = split(bank.base.model), bank.base.tokenizer
    bank.use(mix)
    scores = evaluate(split_model, tokenizer, tokens, options, adapter_off=bank.base_only)
    bank.use(None)
    frontier = measure_frontier(split_model, tokenizer, tokens, scores, options)
    if frontier is None:
        raise XFactorError(f"{mix} gives the set a mass of {scores.set_mass:.3g}, which no finite bias reaches")
    offsets = frontier.strength * tokens.mask().float()
    return offsets, {
        "kind": "fitted",
        "lambda": frontier.strength,
        "rate": scores.rate,
        "rate_of_bias": frontier.evaluation.rate,
        "tokens": tokens.record(),
        "decoding": scores.decoding,
    }
