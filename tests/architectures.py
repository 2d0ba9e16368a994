"""Tiny models with random weights of the architectures of transformers, and what this package does with each.

`examine` gives a row of the table in docs/models.md: everything holds, or a refusal by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from tests.tiny import CONTEXT, VOCABULARY, tiny_tokenizer
from xfactor_peft.base.loading import Base, load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.errors import XFactorError
from xfactor_peft.lowmem import int8_matmul
from xfactor_peft.lowmem.linears import is_linear
from xfactor_peft.lowmem.quantized import QuantizedLinear
from xfactor_peft.objective.targets import UniformTarget
from xfactor_peft.options import EvalOptions, LoadOptions, LoraOptions, Recipe, SamplingOptions, TrainOptions
from xfactor_peft.tokens.token_set import TokenSet
from xfactor_peft.training.run import Hooks
from xfactor_peft.training.train import train_recipe

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "n_embd": 64, "d_model": 64, "ffn_dim": 128, "d_ff": 128, "dff": 128,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "num_attention_heads": 4, "n_head": 4,
    "n_heads": 4, "attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "n_inner": 128,
    "head_dim": 16, "max_position_embeddings": CONTEXT, "n_positions": CONTEXT, "n_ctx": CONTEXT,
    "max_seq_len": CONTEXT, "context_length": CONTEXT, "sliding_window": None, "word_embed_proj_dim": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "rotary_dim": 8, "initializer_range": 0.2, "init_std": 0.2, "dropout": 0.0,
    "layer_types": None, "attention_hidden_size": 64, "state_size": 8, "time_step_rank": 4, "lru_width": 64,
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "num_heads": 8, "n_groups": 1,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "falcon": {"n_inner": None},
    "gpt_bigcode": {"n_inner": None},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "bamba": {"attn_layer_indices": [1]},
    "gemma2": {"sliding_window": 64},
    "gemma3_text": {"sliding_window": 64},
    "cohere2": {"sliding_window": 64},
    "gpt_oss": {"sliding_window": 64},
    "olmo3": {"sliding_window": 64},
    "xglm": {"num_layers": 2},
    "lfm2": {"full_attn_idxs": [1], "layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16, "expand": 2, "chunk_size": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 64},
    "granitemoe": {"num_local_experts": 4},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "exaone4": {"sliding_window": 64, "sliding_window_pattern": 2},
    "nemotron": {"partial_rotary_factor": 0.5},
}
ARCHITECTURES = (
    "gpt2", "openai-gpt", "gpt_neo", "gptj", "gpt_neox", "gpt_bigcode", "codegen", "opt", "xglm", "biogpt", "ctrl",
    "bloom", "mpt", "falcon", "llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2", "gemma3_text",
    "stablelm", "starcoder2", "olmo", "olmo2", "olmo3", "cohere", "cohere2", "granite", "glm", "glm4", "smollm3",
    "nemotron", "persimmon", "helium", "ernie4_5", "exaone4", "arcee", "seed_oss", "apertus", "hunyuan_v1_dense",
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "deepseek_v2", "deepseek_v3", "gpt_oss",
    "lfm2", "jamba", "bamba", "falcon_h1", "recurrent_gemma", "mamba", "mamba2", "falcon_mamba", "rwkv",
)  # fmt: skip
FAST = (
    "gptj", "bloom", "falcon", "qwen3", "gemma2", "cohere", "olmo2", "mixtral", "phimoe", "deepseek_v3", "jamba",
    "mamba", "openai-gpt",
)  # fmt: skip
IDS = torch.arange(24).view(2, 12) * 7 % 300
BRIEF = EvalOptions(("The fox",), 1, SamplingOptions(max_new_tokens=3))


def architecture_config(name: str) -> PretrainedConfig:
    """Two layers of width 64."""
    kind = CONFIG_MAPPING[name]
    known = kind().to_dict() | {key: None for key in getattr(kind, "attribute_map", {})}
    sizes = {key: value for key, value in SIZES.items() if key in known and key not in kind.attribute_map}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return kind(**(sizes | ids | MORE.get(name, {})))


def architecture_folder(name: str, path: Path) -> Path:
    """A model of this architecture and the tiny tokenizer; biases and norms are random, too, so that none is lost."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(architecture_config(name), dtype=torch.float32).eval()
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1 and not any(part in key for part in ("A_log", "dt_bias", "time_", "D")):
                parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@dataclass(frozen=True)
class Row:
    """What was found of one architecture; `refusal` alone, or everything else."""

    name: str
    kind: str
    refusal: str = ""
    logits: bool = False
    quantised: int = 0
    refused_quantised: str = ""
    left: str = ""
    int8: float = 0.0
    nf4: float = 0.0
    trained: int = 0
    moved: int = 0
    without_lora: str = ""

    @property
    def holds(self) -> bool:
        if self.refusal:
            return True
        faithful = max(self.int8, self.nf4) < 1e-3 and self.quantised > 0
        return self.logits and (bool(self.refused_quantised) or faithful) and 0 < self.trained == self.moved


def load(folder: Path, **options: Any) -> Base:
    return load_base(resolve_model(str(folder)), LoadOptions(**{"dtype": "fp32", **options}))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def examine(name: str, folder: Path) -> Row:
    """Load, quantise and train a model in `folder`; assertions are the caller's."""
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kind = type(expected).__name__
    try:
        base = load(folder)
        same = torch.equal(logits(base.model), logits(expected))
        trained, moved, without = trained_layers(base)
    except XFactorError as error:
        return Row(name, kind, refusal=str(error))
    row = Row(name, kind, logits=same, trained=trained, moved=moved, without_lora=", ".join(without))
    for quantization in ("int8", "nf4"):
        try:
            quantised = load(folder, quantization=quantization)
        except XFactorError as error:
            return replace(row, refused_quantised=str(error))
        layers, left = sum(quantised.quantized.values()), ", ".join(quantised.unquantized)
        error = distance_to_definition(quantised, folder)
        row = replace(row, quantised=layers, left=left, **{quantization: error})
    return row


def distance_to_definition(base: Base, folder: Path) -> float:
    """Of the quantised model's logits from those of the plain model with every weight replaced by its codes' values."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, module in base.model.named_modules():
            if isinstance(module, QuantizedLinear):
                layer = plain.get_submodule(path)
                assert is_linear(layer)
                weight = layer.weight.T if module.from_conv1d else layer.weight
                values = module.dequantize()
                error = float((values - weight).norm() / weight.norm())
                assert error < (0.02 if base.quantization == "int8" else 0.13), (path, error)
                weight.copy_(values)
    with patch.object(int8_matmul, "MODE", "off"):  # with it, rows of x are rounded, too
        expected, actual = logits(plain), logits(base.model)
    return float((actual - expected).norm() / expected.norm())


def trained_layers(base: Base) -> tuple[int, int, dict[str, int]]:
    """(layers with LoRA, those whose B moved, what `all` does not reach) after two steps of a run."""
    target = UniformTarget(TokenSet.contains(base.tokenizer, "X", vocab_size=base.vocab_size))
    options = TrainOptions(steps=2, batch_size=4, seq_len=16, lr=1e-2)
    result = train_recipe(base, target, Recipe(options, LoraOptions(r=2), BRIEF), Hooks())
    sides = [p for key, p in result.model.named_parameters() if ".lora_B." in key]
    assert len(sides) == sum(result.modules.values())
    return len(sides), sum(bool(p.detach().any()) for p in sides), result.unmatched
