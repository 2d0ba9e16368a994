"""The literal command on a GGUF file, or on the same model in this package's 8 bits: its peak, and a step's time."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from xfactor_peft.lowmem.gguf_file import GgufFile

from ..command import train
from ..store import Record
from ..tables import Table

LAYERS, WIDTH, INNER, HEADS, GROUPS, TOKENS = 16, 2048, 8192, 32, 8, 128_256


def write_llama_1b(path: Path, vocabulary: GgufFile) -> None:
    """Llama-3.2-1B's shape with random weights in Q4_K, and another file's tokenizer, filled up with unused tokens."""
    dice, writer = np.random.default_rng(0), gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500_000.0)
    writer.add_vocab_size(TOKENS)
    for name in ("model", "pre", "merges", "bos_token_id", "eos_token_id"):
        key = f"tokenizer.ggml.{name}"
        value = vocabulary.fields[key]
        kind = gguf.GGUFValueType.UINT32 if name.endswith("_id") else None
        if kind:
            writer.add_uint32(key, value)
        else:
            (writer.add_array if isinstance(value, list) else writer.add_string)(key, value)
    tokens, kinds = (vocabulary.fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    more = TOKENS - len(tokens)
    writer.add_array("tokenizer.ggml.tokens", tokens + [f"[PAD{number}]" for number in range(more)])
    writer.add_array("tokenizer.ggml.token_type", kinds + [5] * more)
    kv = WIDTH * GROUPS // HEADS
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (kv, WIDTH), "attn_v": (kv, WIDTH), "attn_output": (WIDTH, WIDTH),
              "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}  # fmt: skip
    matrices = {"token_embd": (TOKENS, WIDTH)}
    matrices |= {f"blk.{n}.{part}": shape for n in range(LAYERS) for part, shape in shapes.items()}
    for name, (rows, columns) in matrices.items():
        blocks = dice.integers(0, 256, (rows * columns // 256, 144), dtype=np.uint8)
        blocks[:, :4] = np.array([2e-5, 1.5e-4], dtype=np.float16).view(np.uint8)
        writer.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    for name in ["output_norm", *(f"blk.{n}.{part}" for n in range(LAYERS) for part in ("attn_norm", "ffn_norm"))]:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(words: list[str], threads: int) -> Record:
    """One run of `xfactor train` with these words: peak in MiB, and the mean of its steps' seconds."""
    made = train(words, threads)
    record = made.pop("record")
    step = record["seconds"] / record["steps_made"] if record else None
    return {**made, "step": step, "threads": threads}


def table(records: list[Record]) -> str:
    """One row a run."""
    rows = []
    for record in records:
        run = record["run"]
        step = "–" if run["step"] is None else f"{run['step']:.2f}"
        allowed = f"{1.1 * record['file'] / 2**20 + record['allowance']:.0f}" if record["allowance"] else "–"
        rows.append([f"`{record['command']}`", f"{run['peak']:.0f}", allowed, step, f"{run['threads']}", run["status"]])
    return Table(["command", "peak, MiB", "wanted", "s a step", "threads", "ended"], rows).markdown()
