"""The off-the-shelf arm: GRPO with a KL penalty, as trl has it, on the same LoRA and as many samples.

    pip install -e ".[plot,rl]" && python benchmarks/rate.py run --arms trl --rates 0.1

Reward of a text: -|share of set tokens - R| / R, which is 0 at the wanted share and -1 for a text without any. KL to
the base, which is the model with its adapter off, costs `BETA` times trl's estimate a token (Shao et al. 2024,
arXiv:2402.03300, equations 3 and 4). As many texts as the sequence-level arm draws: steps x 64 of 64 tokens.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import xfactor_peft as xf
from xfactor_peft.lora.wrap import add_lora
from xfactor_peft.sampling.contexts import openings

from ..store import Record

BETA, LEARNING_RATE, TEXTS, GROUP, LENGTH = 0.1, 1e-3, 64, 8, 64


def train_by_grpo(base: Any, tokens: xf.TokenSet, rate: float, seed: int, steps: int) -> tuple[Any, Record]:
    """Train a LoRA on `base`; (model, what is worth writing down)."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model = add_lora(base.model, xf.LoraOptions(r=8, alpha=16, target="all"))

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [-abs(tokens.share(ids) - rate) / rate for ids in completion_ids]

    prompts = [base.tokenizer.decode(ids) for ids in openings(base, 512, seed=seed)]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, seed=seed, max_steps=steps, learning_rate=LEARNING_RATE, beta=BETA,
            per_device_train_batch_size=TEXTS, num_generations=GROUP, max_completion_length=LENGTH, temperature=1.0,
            use_cpu=base.device.type == "cpu", bf16=False, report_to="none", save_strategy="no", logging_steps=10,
            disable_tqdm=True, generation_kwargs={"use_cache": True},
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": prompts})
        trainer = GRPOTrainer(model, reward, config, data, processing_class=base.tokenizer)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    model.eval()
    settings = {"beta": BETA, "lr": LEARNING_RATE, "texts": TEXTS, "group": GROUP, "steps": steps}
    log = [{k: entry[k] for k in ("reward", "kl") if k in entry} for entry in trainer.state.log_history]
    return model, {"seconds": seconds, "rl": settings, "log": log}
