"""What 4 bits do to the gradients that LoRA learns from, and what mends them.

    python benchmarks/four_bit.py                    on the real model of tools/real_model.py
    python benchmarks/four_bit.py --model demo

Every projection of the blocks is replaced by what the format makes of it, in float32, and dL/dW of the first batch
(uniform target, tokens with "x") is brought down to rank 8 by one and the same A. Compared is the cosine with the
unquantised model's. LoftQ (Li et al. 2023, arXiv:2310.08659) adds the best rank-r approximation of what was lost.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import torch
from bench import store
from bench.store import RESULTS, Record
from bench.tables import Table
from bench.training.models import REAL
from torch.nn import functional as F

import xfactor_peft as xf
from xfactor_peft.base.split_model import split
from xfactor_peft.lora.wrap import projections
from xfactor_peft.lowmem.nf4_kernel import CODE
from xfactor_peft.objective.kl import kl_loss
from xfactor_peft.sampling.contexts import batches

RANK = 8


def nf4(weight: torch.Tensor, block: int) -> torch.Tensor:
    """NormalFloat with one scale for `block` entries; by definition the nearest code, not this package's kernel."""
    rows = F.pad(weight.flatten(), (0, -weight.numel() % block)).view(-1, block)
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-38)
    code = torch.tensor(CODE)
    nearest = torch.bucketize(rows / scale, (code[:-1] + code[1:]) / 2)
    return (code[nearest] * scale).flatten()[: weight.numel()].view_as(weight)


def int8(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


def loftq(weight: torch.Tensor, rank: int) -> torch.Tensor:
    quantised = nf4(weight, 64)
    u, s, v = torch.svd_lowrank(weight - quantised, rank + 8, niter=3)
    return quantised + (u[:, :rank] * s[:rank]) @ v[:, :rank].T


def but_down(name: str, weight: torch.Tensor) -> torch.Tensor:
    return int8(weight) if "down_proj" in name or name.endswith("mlp.c_proj") else nf4(weight, 64)


FORMATS: dict[str, tuple[float, Callable[[str, torch.Tensor], torch.Tensor]]] = {
    "8-bit, a scale a row": (8, lambda name, w: int8(w)),
    "4-bit, blocks of 64": (4.5, lambda name, w: nf4(w, 64)),
    "4-bit, blocks of 32": (5, lambda name, w: nf4(w, 32)),
    "4-bit, blocks of 16": (6, lambda name, w: nf4(w, 16)),
    "4-bit, MLP down-projections in 8-bit": (5.4, but_down),
    "4-bit, LoftQ r = 8": (4.5, lambda name, w: loftq(w, 8)),
    "4-bit, LoftQ r = 64": (4.5, lambda name, w: loftq(w, 64)),
}
"""Name: bits a weight without LoRA's own, and the format."""


def gradients(model: torch.nn.Module, names: list[str], loss: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """(loss, dL/dW A^T of every projection in one vector)."""
    generator, parts = torch.Generator().manual_seed(0), []
    value = loss()
    value.backward()
    for name in names:
        gradient = model.get_submodule(name).weight.grad
        parts.append((gradient @ torch.randn(gradient.shape[1], RANK, generator=generator)).flatten())
        model.get_submodule(name).weight.grad = None
    return value.item(), torch.cat(parts)


def measure(name: str) -> list[Record]:
    base = xf.load(name, xf.LoadOptions(dtype="fp32"), offline=True)
    tokens = xf.TokenSet.contains(base.tokenizer, "x", vocab_size=base.vocab_size)
    target, ids = xf.UniformTarget(tokens).probabilities(), next(iter(batches(base, "random", 4, 64, seed=0)))
    names, model = projections(base.model, "all"), base.model.requires_grad_(False)
    layers = {name: model.get_submodule(name).weight for name in names}
    original = {name: weight.detach().clone() for name, weight in layers.items()}
    for weight in layers.values():
        weight.requires_grad_()

    def loss() -> torch.Tensor:
        parts = split(model)
        return kl_loss(parts.hidden(ids).flatten(0, 1), parts.weight, target, tokens.mask(), bias=parts.bias).loss

    first, exact = gradients(model, names, loss)
    found = [{"format": "unquantised", "bits": 32, "loss": first, "cosine": 1.0, "error": 0.0}]
    for format_, (bits, quantise) in FORMATS.items():
        with torch.no_grad():
            for name, weight in layers.items():
                weight.copy_(quantise(name, original[name]))
            lost = sum(float((w - original[n]).square().sum()) for n, w in layers.items())
        value, gradient = gradients(model, names, loss)
        error = (lost / sum(float(w.square().sum()) for w in original.values())) ** 0.5
        cosine = float(F.cosine_similarity(gradient, exact, dim=0))
        found.append({"format": format_, "bits": bits, "loss": value, "cosine": cosine, "error": error})
        click.echo(found[-1])
    return found


def write(folder: Path) -> str:
    """Write the table of the records in `folder` beside them; returns it."""
    lines = [
        [one["format"], f"{one['bits']:g}", f"{one['error']:.1%}", f"{one['loss']:.2f}", f"{one['cosine']:.3f}"]
        for record in store.read_all(folder)
        for one in record["formats"]
    ]
    head = ["blocks of SmolLM2-135M-Instruct", "bits a weight", "lost of W", "loss at the start", "cosine of gradients"]
    return store.write_text(folder / "table.md", Table(head, lines).markdown() + "\n")


@click.command(help=__doc__.split("\n")[0])
@click.option("--model", default=str(REAL), show_default="build/smollm2")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=RESULTS / "four_bit")
def main(model: str, output: Path) -> None:
    record = {"model": Path(model).name, "formats": measure(model), **store.provenance()}
    store.write(output / f"{record['model']}.json", record)
    click.echo(write(output))


if __name__ == "__main__":
    main()
