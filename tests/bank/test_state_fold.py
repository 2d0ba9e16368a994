"""An offset behind an RMSNorm: folded where the states allow it, refused where not, needless for a fitted head."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.adapters.editing import edit_weights
from tests.training.uniform import QUICK
from xfactor_peft.adapters.mix import parse_mix
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.bank.state_fold import _solved, _solved_by_token
from xfactor_peft.base.split_model import SplitModel
from xfactor_peft.errors import XFactorError
from xfactor_peft.export import export
from xfactor_peft.objective.head_fit import Contexts
from xfactor_peft.objective.targets import TiltedTarget
from xfactor_peft.objective.tilt import Atoms
from xfactor_peft.options import ObjectiveOptions, Recipe, TrainOptions
from xfactor_peft.runs.run import train_to_folder
from xfactor_peft.tokens.token_set import TokenSet

IDS = torch.arange(5, 37)[None]


def synthetic(constant):
    """States that point anywhere, beside one coordinate that is `constant`, with a set of base mass 0.2."""
    generator = torch.Generator().manual_seed(0)
    states = torch.cat([torch.randn(500, 5, generator=generator), torch.full((500, 1), constant)], dim=1)
    atoms = Atoms.of(torch.tensor([[0.0, 1.0]]))
    masses = torch.tensor([0.8, 0.2])[atoms.patterns[:, 0].long()].expand(500, 2)
    return [Contexts(states.bfloat16()[None], masses[None])], atoms


def test_a_constant_coordinate_takes_the_whole_offset():
    contexts, atoms = synthetic(3.0)
    fold = _solved(contexts, atoms, torch.tensor([2.0], dtype=torch.float64))
    assert fold.residual < 1e-4
    torch.testing.assert_close(fold.rates_after, fold.rates, rtol=1e-3, atol=0)
    assert fold.kl < 1e-6
    torch.testing.assert_close(
        contexts[0].states[0].double() @ fold.direction, torch.ones(500).double(), atol=1e-3, rtol=0
    )


def test_states_that_have_nothing_in_common_lose_the_rate():
    fold = _solved(*synthetic(0.0), torch.tensor([2.0], dtype=torch.float64))
    assert fold.residual > 0.9
    assert fold.rates_after < 0.5 * fold.rates
    assert fold.kl > 0.05


def trained(base, folder, goal):
    """An adapter on `base` with its logits for `IDS`."""
    tokens = TokenSet.contains(base.tokenizer, "X", vocab_size=base.vocab_size)
    recipe = Recipe(TrainOptions(seq_len=16), None, QUICK, ObjectiveOptions(dial=False, frontier=False))
    train_to_folder(base, TiltedTarget.of(tokens, **goal), folder / "x", recipe)


def exported(base, folder):
    """(logits with the adapter, those of the exported folder in plain transformers, what the export says)."""
    bank = AdapterBank(base, folder)
    bank.load("x")
    bank.use("x")
    with torch.no_grad():
        wanted = bank.model(input_ids=IDS).logits
    said = export(bank, parse_mix("x", ["x"]), "merged", folder / "merged")
    with torch.no_grad():
        return wanted, AutoModelForCausalLM.from_pretrained(folder / "merged")(input_ids=IDS).logits, said


def test_a_fitted_head_leaves_exactly(load_tiny, tmp_path):
    trained(load_tiny("llama"), tmp_path, {"rate": 0.3})
    wanted, found, said = exported(load_tiny("llama"), tmp_path)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert "folded" not in said


def with_a_constant(base):
    """The base with one coordinate of its embedding large and alike for all tokens, as trained models have some."""
    with torch.no_grad():
        base.model.get_input_embeddings().weight[:, 0] = 100 * base.model.get_input_embeddings().weight.std()
    return base


def test_a_bias_leaves_nearly_or_not_at_all(load_tiny, tmp_path):
    folder = tmp_path / "alike"
    trained(with_a_constant(load_tiny("llama")), folder, {"strength": 2.0})
    wanted, found, said = exported(with_a_constant(load_tiny("llama")), folder)
    assert "offset folded with a residual of 0." in said
    assert "KL" in said
    assert (found.softmax(-1) - wanted.softmax(-1)).abs().sum(-1).max() < 0.01
    trained(load_tiny("llama"), tmp_path, {"strength": 30.0})
    with pytest.raises(XFactorError, match="is constant enough for the set head's offset"):
        exported(load_tiny("llama"), tmp_path)
    assert not (tmp_path / "merged").exists()


def with_many_offsets(tensors):
    """200 offsets, as a head for phrases has them, with a ban among them."""
    bias = next(tensor for name, tensor in tensors.items() if name.endswith("lora_B.bias"))
    bias.zero_()
    bias[100:300] = torch.linspace(-2, 2, 200)
    bias[50:60] = -100


def test_many_offsets_are_folded_token_by_token(load_tiny, tmp_path, monkeypatch):
    trained(with_a_constant(load_tiny("llama")), tmp_path, {"strength": 2.0})
    edit_weights(with_many_offsets)(tmp_path / "x")
    (tmp_path / "x/xfactor.json").unlink()  # which holds the hash
    sets, of = [], Atoms.of
    monkeypatch.setattr(Atoms, "of", lambda members: sets.append(len(members)) or of(members))
    wanted, found, said = exported(with_a_constant(load_tiny("llama")), tmp_path)
    assert max(sets) == 3
    assert (found.softmax(-1) - wanted.softmax(-1)).abs().sum(-1).max() < 0.02
    assert len(said[said.index("offset folded") :]) < 300
    assert re.search(
        r"R banned 0.0000 → 0.0000, lowered \S+ → \S+, raised .* bans of -100 are -\d+ at the weakest", said
    )


def test_token_by_token_and_set_by_set_agree_where_every_set_is_a_token(load_tiny):
    policy, bias = SplitModel(load_tiny("llama").model), torch.zeros(384)
    bias[10:14] = torch.tensor([-3.0, -1.0, 1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(100, 64, generator=generator).bfloat16()
    values = bias[10:14]
    atoms = Atoms.of(bias == values[:, None])
    with torch.no_grad():
        masses = atoms.masses(policy.logits(states.float()).log_softmax(-1)).float()
    one = _solved([Contexts(states[None], masses[None])], atoms, values.double())
    two = _solved_by_token(policy, states, bias, bias == values[:, None])
    for name in ("direction", "rates", "rates_after"):
        torch.testing.assert_close(getattr(two, name), getattr(one, name), atol=1e-5, rtol=1e-4)
    assert (two.residual, two.least) == pytest.approx((one.residual, one.least), rel=1e-3)
    assert two.kl == pytest.approx(one.kl, rel=1e-2)
    assert two.kl > 1e-3
