"""Write a checkpoint with random weights in the exact layout of the Hub's files: GPT-2's, Llama's or Qwen2's.

    python tools/make_checkpoint.py OUTPUT --shape gpt2-medium --tokenizer FOLDER
    python tools/make_checkpoint.py OUTPUT --shape llama-3.2-1b --tokenizer FOLDER

GPT-2's files differ from what `save_pretrained` writes today, and loaders stumble on it: keys have no
`transformer.` prefix, everything is float32, there is no `lm_head.weight` (it is tied to `wte.weight`), and
every block carries its causal mask as `h.N.attn.bias`. `--layout transformers` writes today's layout instead,
with the same weights for the same seed. The others are bfloat16, and have one layout.

Tensors are drawn and written a piece at a time, in the safetensors format (8 bytes of header length, a JSON
header, the data: https://github.com/huggingface/safetensors#format), so 1.5 GB on disk need little memory.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import Tokenizer

EOS = "<|endoftext|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
DTYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16)}
LAYOUTS = ("hub", "transformers")
CHUNK = 1 << 20
WEIGHT_STD = 0.02
GPT2_CONFIG = """{
  "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
  "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "initializer_range": 0.02,
  "layer_norm_epsilon": 1e-05, "n_special": 0, "predict_special_tokens": true, "summary_activation": null,
  "summary_first_dropout": 0.1, "summary_proj_to_labels": true, "summary_type": "cls_index",
  "summary_use_proj": true, "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}
}"""
LLAMA_CONFIG = """{
  "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": false, "attention_dropout": 0.0,
  "hidden_act": "silu", "initializer_range": 0.02, "mlp_bias": false, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
  "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
    "original_max_position_embeddings": 8192}, "tie_word_embeddings": true, "torch_dtype": "bfloat16"
}"""
QWEN2_CONFIG = """{
  "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_dropout": 0.0, "hidden_act": "silu",
  "initializer_range": 0.02, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "max_window_layers": 24,
  "use_sliding_window": false, "tie_word_embeddings": true, "torch_dtype": "bfloat16"
}"""
CONFIGS = {"gpt2": GPT2_CONFIG, "llama": LLAMA_CONFIG, "qwen2": QWEN2_CONFIG}
NOTE = """This checkpoint is NOT a pretrained model.

It has the shape and the file layout of {shape}, and random weights (seed {seed}, {dtype}, layout "{layout}"),
written by tools/make_checkpoint.py to measure memory and time and to test loading. Its text is noise.
"""


@dataclass(frozen=True)
class Shape:
    """The sizes that set a model's shape; `groups` of heads share their keys, `inner` is the MLP's width."""

    width: int
    layers: int
    heads: int
    context: int = 1024
    vocabulary: int = 50257
    family: str = "gpt2"
    groups: int = 0
    inner: int = 0
    dtype: str = "float32"


SHAPES = {
    "gpt2-medium": Shape(width=1024, layers=24, heads=16),
    "gpt2": Shape(width=768, layers=12, heads=12),
    "llama-3.2-1b": Shape(2048, 16, 32, 131_072, 128_256, "llama", groups=8, inner=8192, dtype="bfloat16"),
    "qwen2.5-0.5b": Shape(896, 24, 14, 32_768, 151_936, "qwen2", groups=2, inner=4864, dtype="bfloat16"),
    "tiny": Shape(width=64, layers=2, heads=4, context=128, vocabulary=512),
}


@dataclass(frozen=True)
class Tensor:
    """One entry of the file: its key, its size, and how its values are made."""

    key: str
    size: tuple[int, ...]
    kind: str  # "normal", "ones", "zeros" or "mask"
    std: float = 0.0

    @property
    def count(self) -> int:
        return math.prod(self.size)


def tensors(shape: Shape, layout: str, std: float = WEIGHT_STD) -> list[Tensor]:
    """Every tensor of the file, ordered by key, as the Hub's files are."""
    entries = _gpt2(shape, layout, std) if shape.family == "gpt2" else _llama(shape, std)
    return sorted(entries, key=lambda entry: entry.key)


def _gpt2(shape: Shape, layout: str, std: float) -> list[Tensor]:
    width, residual_std = shape.width, std / math.sqrt(2 * shape.layers)
    entries = [
        Tensor("wte.weight", (shape.vocabulary, width), "normal", std),
        Tensor("wpe.weight", (shape.context, width), "normal", std),
        Tensor("ln_f.weight", (width,), "ones"),
        Tensor("ln_f.bias", (width,), "zeros"),
    ]
    for block in range(shape.layers):
        name = f"h.{block}."
        if layout == "hub":
            entries.append(Tensor(name + "attn.bias", (1, 1, shape.context, shape.context), "mask"))
        for norm in ("ln_1", "ln_2"):
            entries.append(Tensor(f"{name}{norm}.weight", (width,), "ones"))
            entries.append(Tensor(f"{name}{norm}.bias", (width,), "zeros"))
        # Conv1D keeps weights as (inputs, outputs), the transpose of nn.Linear.
        for layer, inputs, outputs in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            spread = residual_std if layer.endswith("c_proj") else std
            entries.append(Tensor(f"{name}{layer}.weight", (inputs, outputs), "normal", spread))
            entries.append(Tensor(f"{name}{layer}.bias", (outputs,), "zeros"))
    prefix = "transformer." if layout == "transformers" else ""
    return [replace(entry, key=prefix + entry.key) for entry in entries]


def _llama(shape: Shape, std: float) -> list[Tensor]:
    """Llama's and Qwen2's, which has biases of queries, keys and values."""
    width, keys = shape.width, shape.width // shape.heads * shape.groups
    residual_std = std / math.sqrt(2 * shape.layers)
    entries = [
        Tensor("model.embed_tokens.weight", (shape.vocabulary, width), "normal", std),
        Tensor("model.norm.weight", (width,), "ones"),
    ]
    for block in range(shape.layers):
        name = f"model.layers.{block}."
        entries += [
            Tensor(f"{name}{norm}.weight", (width,), "ones") for norm in ("input_layernorm", "post_attention_layernorm")
        ]
        for layer, rows, columns in (
            ("self_attn.q_proj", width, width),
            ("self_attn.k_proj", keys, width),
            ("self_attn.v_proj", keys, width),
            ("self_attn.o_proj", width, width),
            ("mlp.gate_proj", shape.inner, width),
            ("mlp.up_proj", shape.inner, width),
            ("mlp.down_proj", width, shape.inner),
        ):
            spread = residual_std if layer.endswith(("o_proj", "down_proj")) else std
            entries.append(Tensor(f"{name}{layer}.weight", (rows, columns), "normal", spread))
            if shape.family == "qwen2" and layer.endswith(("q_proj", "k_proj", "v_proj")):
                entries.append(Tensor(f"{name}{layer}.bias", (rows,), "zeros"))
    return entries


def header(entries: list[Tensor], dtype: str) -> bytes:
    """The safetensors header: its length in 8 bytes, then JSON, padded so that the data start aligned."""
    code, torch_dtype = DTYPES[dtype]
    contents: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        end = start + entry.count * torch_dtype.itemsize
        contents[entry.key] = {"dtype": code, "shape": list(entry.size), "data_offsets": [start, end]}
        start = end
    text = json.dumps(contents, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def values(entry: Tensor, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """The entry's float32 values in order, at most `CHUNK` at a time (a mask: one row at a time)."""
    if entry.kind == "mask":
        rows, columns = entry.size[-2:]
        for row in range(rows):
            yield (torch.arange(columns) <= row).float()
        return
    for start in range(0, entry.count, CHUNK):
        count = min(CHUNK, entry.count - start)
        if entry.kind == "normal":
            yield torch.empty(count).normal_(0.0, entry.std, generator=generator)
        else:
            yield torch.full((count,), 1.0 if entry.kind == "ones" else 0.0)


def write_safetensors(path: Path, entries: list[Tensor], *, seed: int, dtype: str) -> None:
    """Write under a temporary name, then move it in place: half a file is never taken for a model."""
    generator = torch.Generator().manual_seed(seed)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(header(entries, dtype))
            for entry in entries:
                for chunk in values(entry, generator):
                    file.write(chunk.to(DTYPES[dtype][1]).view(torch.uint8).numpy().data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def config(shape: Shape, end_of_text: int) -> dict[str, Any]:
    """`config.json` with the keys of the Hub's files."""
    if shape.family == "gpt2":
        sizes = {"n_embd": shape.width, "n_layer": shape.layers, "n_head": shape.heads}
        sizes |= {"n_ctx": shape.context, "n_positions": shape.context}
    else:
        sizes = {"hidden_size": shape.width, "num_hidden_layers": shape.layers, "intermediate_size": shape.inner}
        sizes |= {"num_attention_heads": shape.heads, "num_key_value_heads": shape.groups}
        sizes |= {"max_position_embeddings": shape.context}
    ids = {"vocab_size": shape.vocabulary, "bos_token_id": end_of_text, "eos_token_id": end_of_text}
    return {**json.loads(CONFIGS[shape.family]), **sizes, **ids}


def fitted(shape: str, tokenizer: Path | None) -> tuple[Shape, int]:
    """(the shape with its vocabulary's size, id of <|endoftext|>); ValueError for a misfit tokenizer."""
    sizes = SHAPES[shape]
    if tokenizer is None:
        return sizes, sizes.vocabulary - 1
    file = tokenizer / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"--tokenizer {tokenizer}: there is no tokenizer.json in it")
    loaded = Tokenizer.from_file(str(file))
    tokens, end_of_text = loaded.get_vocab_size(with_added_tokens=True), loaded.token_to_id(EOS)
    if end_of_text is None:
        raise ValueError(f"--tokenizer {tokenizer}: it has no {EOS} token, which ends a text")
    if shape == "tiny":
        return replace(sizes, vocabulary=tokens), end_of_text
    if tokens > sizes.vocabulary:
        raise ValueError(f"--tokenizer {tokenizer}: {tokens} tokens, but {shape} has only {sizes.vocabulary}")
    return sizes, end_of_text


def write_checkpoint(
    output: Path,
    shape: str = "tiny",
    *,
    layout: str = "hub",
    seed: int = 0,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    std: float = WEIGHT_STD,
) -> Path:
    """Write the weights, `config.json`, `generation_config.json` and a note into `output`; returns it.

    Linear weights and embeddings are normal, their std over sqrt(2 * layers) for the two projections into the
    residual stream; gains are 1 and biases 0. With std 0.02 that is GPT-2's own initialisation.

    Args:
        output: the folder to make; files of an earlier checkpoint in it are replaced.
        shape: a key of `SHAPES`. "tiny" takes its vocabulary's size from the tokenizer, when one is given.
        layout: of GPT-2's: "hub" (bare keys and mask buffers) or "transformers" (`transformer.` keys, no masks).
        seed: the same seed gives the same weights in either layout.
        dtype: a key of `DTYPES`; None is that of the Hub's files.
        tokenizer: a folder whose tokenizer files are copied in.
        std: of linear weights and embeddings.

    Raises:
        ValueError: the tokenizer does not fit the shape.
    """
    sizes, end_of_text = fitted(shape, tokenizer)
    dtype = dtype or sizes.dtype
    output.mkdir(parents=True, exist_ok=True)
    note = NOTE.format(shape=shape, seed=seed, dtype=dtype, layout=layout)
    (output / "RANDOM_WEIGHTS.txt").write_text(note, encoding="utf-8")
    write_json(output / "config.json", config(sizes, end_of_text))
    generation = {"_from_model_config": True, "bos_token_id": end_of_text, "eos_token_id": end_of_text}
    write_json(output / "generation_config.json", {**generation, "transformers_version": "4.26.0.dev0"})
    if tokenizer is not None:
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, output / name)
    write_safetensors(output / "model.safetensors", tensors(sizes, layout, std), seed=seed, dtype=dtype)
    return output


def write_json(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@click.command()
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
@click.option("--shape", type=click.Choice(list(SHAPES)), default="gpt2-medium", show_default=True)
@click.option("--layout", type=click.Choice(LAYOUTS), default="hub", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="[default: that of the Hub's files]")
@click.option("--tokenizer", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Copied in.")
@click.option("--force", is_flag=True, help="Write into a folder that already holds something.")
def main(
    output: Path, shape: str, layout: str, seed: int, dtype: str | None, tokenizer: Path | None, force: bool
) -> None:
    """Write a checkpoint with random weights into OUTPUT."""
    if output.exists() and any(output.iterdir()) and not force:
        raise click.UsageError(f"{output} already holds files; give another folder, or --force")
    try:
        write_checkpoint(output, shape, layout=layout, seed=seed, dtype=dtype, tokenizer=tokenizer)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    size = (output / "model.safetensors").stat().st_size / 2**20
    kind = f"{shape} shape, {layout} layout, {dtype or SHAPES[shape].dtype}"
    click.echo(f"{output}: {kind}, random weights, {size:,.0f} MiB")


if __name__ == "__main__":
    main()
