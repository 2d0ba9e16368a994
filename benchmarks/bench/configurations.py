"""Forty short runs of every kind, and the random models of a few families that they are of."""

from __future__ import annotations

from pathlib import Path

SHORT = ["--steps", "3", "--eval-repeats", "1", "--eval-tokens", "24"]
KINDS = {
    "fp32": ["--dtype", "fp32"], "bf16": ["--dtype", "bf16"], "8bit": ["--load-in-8bit"], "4bit": ["--load-in-4bit"],
}  # fmt: skip
RATE = ["--target-rate", "0.1"]
SEQUENCE = [*RATE, "--sequence-level", "--sequence-steps", "1"]
MADE = ("gpt2", "llama", "neox")
CASES = (
    "demo bf16 whole 16", "demo 8bit recomputed 16", "demo bf16 whole 256", "demo 8bit recomputed 256",
    "gpt2 bf16 whole 256", "gpt2 8bit recomputed 256", "gpt2 4bit recomputed 16", "llama bf16 whole 64",
    "llama fp32 recomputed 64", "llama 8bit recomputed 128", "llama 4bit recomputed 64", "neox bf16 whole 64",
    "neox 8bit recomputed 64", "real bf16 whole 64", "real 8bit recomputed 64", "real 4bit recomputed 64",
    "gpt2m 8bit recomputed 64", "gpt2m 4bit recomputed 64",
)  # fmt: skip


def _case(model: str, kind: str, blocks: str = "whole", length: int = 64, *more: str) -> tuple[str, list[str]]:
    name = "-".join([model, kind, blocks, str(length)])
    recompute = "on" if blocks == "recomputed" else "off"
    words = [*KINDS[kind], "--checkpointing", recompute, "--seq-len", str(length), *SHORT, *more]
    return name, ["--model", model, *words]


def configurations() -> dict[str, list[str]]:
    """Words of `xfactor train` by the configuration's name; the model is a name that `folders` knows, or the demo."""
    every = [(model, blocks) for model in ("demo", "gpt2") for blocks in ("whole", "recomputed")]
    found = dict(_case(model, kind, blocks) for model, blocks in every for kind in KINDS)
    for text in CASES:
        model, kind, blocks, length = text.split()
        name, words = _case(model, kind, blocks, int(length))
        found[name] = words
    for model, kind in (("demo", "bf16"), ("demo", "8bit"), ("gpt2", "bf16")):
        name, words = _case(model, kind, "whole", 64, *RATE)
        found[f"{name}-rate"] = words
    for name, more in (("blocks", [*RATE, "--target", "all", "--no-dial"]), ("sequence", SEQUENCE)):
        found[f"demo-bf16-{name}"] = _case("demo", "bf16", "whole", 64, *more)[1]
    found["demo-fp32-full"] = _case("demo", "fp32", "whole", 64, "--method", "full")[1]
    return found


def make_models(folder: Path) -> dict[str, str]:
    """Write the random models; returns their folders by name."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 1408}
    configs = {
        "gpt2": GPT2Config(vocab_size=20_000, n_embd=768, n_layer=8, n_head=12, **ends),
        "llama": LlamaConfig(vocab_size=32_000, num_key_value_heads=4, **sizes, **ends),
        "neox": GPTNeoXConfig(vocab_size=12_000, **sizes, **ends),
    }
    for name, config in configs.items():
        if not (folder / name / "model.safetensors").is_file():
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in configs}
