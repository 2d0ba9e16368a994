"""transformers' Trainer with the objective of this package, and trackers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from tests.conftest import SHORT_EVALUATION
from tests.objective.one_set import tilt_kl
from tests.tiny import tiny_model, tiny_tokenizer
from xfactor_peft.errors import XFactorError
from xfactor_peft.lora.wrap import add_lora
from xfactor_peft.objective import kl as losses
from xfactor_peft.objective.targets import TiltedTarget, UniformTarget
from xfactor_peft.options import LoraOptions, TrainOptions
from xfactor_peft.runs.tracking import Tracking
from xfactor_peft.tokens.token_set import TokenSet
from xfactor_peft.training.train import Step, train
from xfactor_peft.training.trainer import TokenSetTrainer, random_contexts

STEPS = 6


@pytest.fixture
def target():
    return UniformTarget(TokenSet.contains(tiny_tokenizer(), "X"))


def arguments(folder, **more):
    settings = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.0,
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "logging_steps": 1,
        "max_grad_norm": 0,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **more,
    }  # fmt: skip
    return TrainingArguments(str(folder), **settings)


def test_only_the_bases_dropout_is_switched_off(target, tmp_path):
    model = add_lora(tiny_model("gpt2"), LoraOptions(r=4, dropout=0.25))
    TokenSetTrainer(model, arguments(tmp_path), target=target)
    rates = {
        ("lora" in name, module.p) for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)
    }
    assert rates == {(True, 0.25), (False, 0.0)}


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainer_and_our_loop_have_the_same_losses(tiny, target, tmp_path):
    ours = train(tiny, target, TrainOptions(steps=STEPS, seq_len=16, lr=1e-2), LoraOptions(r=4), SHORT_EVALUATION)
    torch.manual_seed(0)
    model = add_lora(tiny_model("gpt2"), LoraOptions(r=4))
    data = random_contexts(384, 4 * STEPS, length=16)
    trainer = TokenSetTrainer(model, arguments(tmp_path), target=target, train_dataset=data)
    trainer.train()
    theirs = losses_of(trainer)
    assert theirs == pytest.approx([step.loss for step in ours.history], rel=2e-3)
    assert theirs[-1] < theirs[0] - 0.3
    assert trainer.state.log_history[0]["set_mass"] == pytest.approx(ours.history[0].set_mass, rel=1e-3)
    assert trainer.evaluate(random_contexts(384, 8, length=16, seed=1))["eval_loss"] < theirs[-1]


def test_gradient_accumulation_is_one_batch_of_all(target, tmp_path):
    runs = []
    for size, count in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        model = add_lora(tiny_model("gpt2"), LoraOptions(r=4))
        more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count, "max_steps": 3}
        data = random_contexts(384, 12, length=16)
        trainer = TokenSetTrainer(model, arguments(tmp_path, **more), target=target, train_dataset=data)
        trainer.train()
        runs.append(losses_of(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)


class _Largest(TorchDispatchMode):
    """The most bytes that any tensor made in the block has in memory (views count as what they look at)."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_no_tensor_of_all_logits_is_made(kind, target, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "loss_positions", lambda entries, dtype: 8)
    model = get_peft_model(tiny_model(kind), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    rows = model.get_output_embeddings().weight.shape[0]
    tokens = TokenSet(target.tokens.ids, rows, target.tokens.rule)
    data = random_contexts(384, 16, length=64)
    trainer = TokenSetTrainer(model, arguments(tmp_path), target=UniformTarget(tokens), train_dataset=data)
    batch = next(iter(trainer.get_train_dataloader()))
    every_logit = batch["input_ids"].numel() * rows * 4
    plain = Trainer(model, arguments(tmp_path))
    for each in (trainer, plain):
        each.current_gradient_accumulation_steps = 1
    with _Largest() as largest:
        trainer.training_step(model, batch)
    assert largest.size < every_logit
    with _Largest() as largest:
        plain.training_step(model, {**batch, "labels": batch["input_ids"]})
    assert largest.size >= every_logit


def test_a_tilt_in_the_trainer(target, tmp_path):
    """Before the first update the adapted model is the base, so the loss is the price of the tilt."""
    model = add_lora(tiny_model("gpt2"), LoraOptions(r=8))
    data = random_contexts(384, 8, length=16)
    with torch.no_grad():
        p = model(input_ids=torch.stack([data[i]["input_ids"] for i in range(4)])).logits.softmax(-1)
    price = float(tilt_kl(p[..., target.tokens.mask()].sum(-1), 2.0).mean())
    tilted = TiltedTarget.of(target.tokens, strength=2.0)
    trainer = TokenSetTrainer(model, arguments(tmp_path, max_steps=2), target=tilted, train_dataset=data)
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(price, rel=1e-3)
    assert losses_of(trainer)[1] != pytest.approx(price, rel=1e-2)
    for bad, wrapped in ((TiltedTarget.of(target.tokens, 0.1), model), (tilted, tiny_model("gpt2"))):
        with pytest.raises(XFactorError, match="in the Trainer a TiltedTarget needs strengths"):
            TokenSetTrainer(wrapped, arguments(tmp_path), target=bad, train_dataset=data)


def test_steps_go_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracking = Tracking(["tensorboard"], "run", tmp_path, {"lr": 1e-3, "method": "lora"})
    for step in range(3):
        tracking(Step(step, 2.0 - step / 2, 0.1 * step, 1.0, 0.01))
    tracking.log({"R": 0.25}, 3)
    tracking.finish()
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [2.0, 1.5, 1.0]
    assert [event.step for event in events.Scalars("train/set_mass")] == [0, 1, 2]
    assert events.Scalars("R")[0].value == 0.25
    with pytest.raises(XFactorError, match=r"`trackers=nope`: unknown tracker; accelerate knows .*tensorboard"):
        Tracking(["nope"], "run", tmp_path)
    with pytest.raises(XFactorError, match="its package is not installed; pip install aim"):
        Tracking(["aim"], "run", tmp_path)
