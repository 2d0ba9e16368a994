"""Text: perplexity of held-out prose, and samples with the set's tokens marked."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from xfactor_peft.base.loading import Base
from xfactor_peft.base.split_model import SplitModel
from xfactor_peft.options import SamplingOptions
from xfactor_peft.sampling.generation import generate
from xfactor_peft.tokens.highlight import marked_parts
from xfactor_peft.tokens.token_set import TokenSet

from ..store import Record

HELD_OUT = Path(__file__).with_name("held_out.txt")
WINDOW = 128


def held_out_windows(tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> torch.Tensor:
    """At most `count` windows of the held-out text, spread evenly over it; (N, length) ids."""
    ids = torch.tensor(tokenizer(HELD_OUT.read_text(encoding="utf-8"), truncation=False, verbose=False)["input_ids"])
    windows = ids[: len(ids) // length * length].view(-1, length)
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).round().long()]


@torch.no_grad()
def perplexity(split_model: SplitModel, windows: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood of every token but the first of its window."""
    total = 0.0
    for window in windows.to(split_model.weight.device):
        logits = split_model.logits(split_model.hidden(window[None])[0, :-1]).float()
        total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
    return math.exp(min(700.0, total / windows[:, 1:].numel()))


def held_out(policy: SplitModel, reference: Base, untrained: SplitModel, count: int) -> Record:
    """Perplexity of plain text before and after; more afterwards is forgetting."""
    context = getattr(reference.model.config, "max_position_embeddings", None) or WINDOW
    windows = held_out_windows(reference.tokenizer, count, min(WINDOW, context))
    before, after = perplexity(untrained, windows), perplexity(policy, windows)
    return {"before": before, "after": after, "ratio": after / before, "tokens": windows.numel()}


def sample(base: Base, tokens: TokenSet, prompt: str, options: SamplingOptions) -> Record:
    """One continuation as [text, is it of the set?] pieces, with its own R."""
    ids = generate(base.model, base.tokenizer, prompt, options)
    figures = {"rate": tokens.share(ids), "tokens": len(ids), "decoding": options.record()}
    return {"prompt": prompt, "pieces": marked_parts(base.tokenizer, ids, [tokens]), **figures}
