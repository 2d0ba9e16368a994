"""llama.cpp itself, through the package xllamacpp, for tests: what it makes of a GGUF file."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
import torch

xllamacpp = pytest.importorskip("xllamacpp", reason="the package xllamacpp is not installed")


class LlamaCpp:
    """A GGUF model, with adapters at their scales; tokens and next-token distributions."""

    def __init__(self, path: Path, vocabulary: int, *adapters: tuple[Path, float]) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.port = 128, 1, False, 0
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        found = []
        for file, scale in adapters:
            adapter = xllamacpp.CommonAdapterLoraInfo()
            adapter.path, adapter.scale = str(file), scale
            found.append(adapter)
        parameters.lora_adapters = found
        self.server, self.vocabulary = xllamacpp.Server(parameters), vocabulary

    def _asked(self, path: str, request: dict) -> dict:
        address = urllib.request.Request(f"{self.server.listening_address}/{path}", json.dumps(request).encode())
        address.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(address, timeout=60) as answer:
            return json.load(answer)

    def tokens(self, text: str) -> list[int]:
        return self._asked("tokenize", {"content": text, "add_special": False})["tokens"]

    def log_probs(self, ids: list[int]) -> torch.Tensor:
        """Of the token after `ids`, (V,)."""
        request = {
            "prompt": ids,
            "n_predict": 1,
            "n_probs": self.vocabulary,
            "cache_prompt": False,
            "return_tokens": True,
        }
        for seed in range(
            20
        ):  # a token that is a part of a character has no probabilities until the character is whole
            places = self._asked("completion", {**request, "seed": seed, "temperature": 1.0}).get(
                "completion_probabilities"
            )
            if places:
                break
        found = torch.full((self.vocabulary,), float("nan"))
        for candidate in places[0]["top_logprobs"]:
            found[candidate["id"]] = candidate["logprob"]
        assert not found.isnan().any()
        return found
