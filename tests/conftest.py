"""Fixtures that several test files share."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests reach no network; those of the Hub use their own stand-in
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.tiny import KINDS, tiny_model_folder
from xfactor_peft.loading import Base, LoadOptions, load_base
from xfactor_peft.models import resolve_model

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory):
    """One model folder of each family, made once."""
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny_model_folder(kind, root / kind) for kind in KINDS}


@pytest.fixture
def load_tiny(tiny_folders):
    """A function that loads a fresh tiny model: load_tiny("gpt2", dtype="fp32", ...)."""

    def load(kind: str = "gpt2", **options) -> Base:
        return load_base(resolve_model(str(tiny_folders[kind])), LoadOptions(**{"dtype": "fp32", **options}))

    return load


@pytest.fixture
def tiny(load_tiny) -> Base:
    """A fresh tiny GPT-2 in float32."""
    return load_tiny()
