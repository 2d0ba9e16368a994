"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests reach no network; those of the Hub use their own stand-in
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, here and in every process of a test

import bitsandbytes  # noqa: F401 (first, so that no command line run in this process leaves it out)
import pytest
from click.testing import CliRunner

from tests.tiny import KINDS, tiny_model_folder
from xfactor_peft.base import weight_cache
from xfactor_peft.base.loading import Base, load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.cli import main
from xfactor_peft.objective.targets import TiltedTarget, UniformTarget
from xfactor_peft.options import (
    EvalOptions,
    LoadOptions,
    LoraOptions,
    ObjectiveOptions,
    Recipe,
    SamplingOptions,
    TrainOptions,
)
from xfactor_peft.runs.run import train_to_folder
from xfactor_peft.sampling import prompt_families
from xfactor_peft.tokens.token_set import TokenSet

SHORT_EVALUATION = EvalOptions(prompts=("The fox", "Once"), repeats=2, sampling=SamplingOptions(max_new_tokens=16))


def pytest_collection_finish():
    """What is imported stays: a collection, of which a run has several, takes 0.2 s less without it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Mapped weights are written to a folder of the tests', not to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(weight_cache.PLACE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def few_prompts(tmp_path_factory):
    """One short bundled family beside the model's own openings: what is calibrated takes a fraction of the time."""
    file = tmp_path_factory.mktemp("prompts") / "few.json"
    file.write_text('{"fit": {"short": ["The fox", "A cat", "In the house"]}, "held-out": {"short": ["Once"]}}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_families, "_BUNDLED", file)
        yield


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory):
    """One model folder of each family, made once."""
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny_model_folder(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="session")
def load_tiny(tiny_folders):
    """A function that loads a fresh tiny model: load_tiny("gpt2", dtype="fp32", ...)."""

    def load(kind: str = "gpt2", **options) -> Base:
        return load_base(resolve_model(str(tiny_folders[kind])), LoadOptions(**{"dtype": "fp32", **options}))

    return load


@pytest.fixture(scope="session")
def adapters_root(tiny_folders, tmp_path_factory):
    """Adapters for the tiny GPT-2, made once, not to be changed: "x" and "z" of different ranks and layers, and "head",
    a set head alone that raises the logits of the tokens with an "X" by 2."""
    root = tmp_path_factory.mktemp("adapters")
    for name, text, lora in (("x", "X", LoraOptions(r=8)), ("z", "Z", LoraOptions(r=4, target="attention"))):
        base = load_base(resolve_model(str(tiny_folders["gpt2"])), LoadOptions("fp32"))
        target = UniformTarget(TokenSet.contains(base.tokenizer, text))
        train_to_folder(
            base, target, root / name, Recipe(TrainOptions(steps=30, seq_len=16, lr=1e-2), lora, SHORT_EVALUATION)
        )
    base = load_base(resolve_model(str(tiny_folders["gpt2"])), LoadOptions("fp32"))
    target = TiltedTarget.of(TokenSet.contains(base.tokenizer, "X"), strength=2.0)
    objective = ObjectiveOptions(contexts="random", dial=False, frontier=False)
    train_to_folder(
        base, target, root / "head", Recipe(TrainOptions(steps=1, seq_len=8), None, SHORT_EVALUATION, objective)
    )
    return root


@pytest.fixture
def tiny(load_tiny) -> Base:
    """A fresh tiny GPT-2 in float32."""
    return load_tiny()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call the command line in an empty folder: run("train", ...) -> result; any exception but exit is a failure."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, code=0, **options):
        result = CliRunner().invoke(main, [str(a) for a in arguments], **options)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return call
