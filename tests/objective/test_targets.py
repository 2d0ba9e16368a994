"""Targets: their levels, what they record, and their refusals, word for word."""

from __future__ import annotations

import re

import pytest
import torch

from xfactor_peft.errors import XFactorError
from xfactor_peft.objective.targets import Goal, TiltedTarget, UniformTarget
from xfactor_peft.objective.tilt import MAX_STRENGTH
from xfactor_peft.options import LoraOptions, ObjectiveOptions, RateOptions, TrainOptions
from xfactor_peft.tokens.rule import Rule
from xfactor_peft.tokens.token_set import TokenSet

ONE, TWO = TokenSet((1, 3), 8, Rule("contains", "X")), TokenSet((2,), 8)


def refused(message, make):
    with pytest.raises(XFactorError, match=f"^{re.escape(message)}$"):
        make()


def test_uniform_levels_by_hand():
    target = UniformTarget(ONE, 3.0, 1.0)  # Z = 3 * 2 + 1 * 6
    assert target.levels == (0.25, 1 / 12)
    assert target.set_mass == 0.5
    p = target.probabilities()
    assert p.dtype == torch.float32
    torch.testing.assert_close(p, torch.tensor([1, 3, 1, 3, 1, 1, 1, 1]) / 12)
    assert target.probabilities("meta").device.type == "meta"
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(target.probabilities(), p)
    finally:
        torch.set_default_dtype(previous)
    assert UniformTarget(ONE).levels == (0.5, 0.0)
    assert UniformTarget(ONE).record() == {"kind": "uniform", "alpha": 1.0, "beta": 0.0}


@pytest.mark.parametrize("values", [(1.0, 1.0), (1.0, -0.5), (float("inf"), 0.0), (1.0, float("-inf"))])
def test_uniform_levels_that_are_refused(values):
    message = "`alpha` must be greater than `beta`, and `beta` at least 0; got {:g} and {:g}".format(*values)
    refused(message, lambda: UniformTarget(ONE, *values))


def test_goals_record_what_they_are():
    rate, strength = Goal(ONE, 0.25), Goal(TWO, strength=-2.0)
    assert rate.record() == {"tokens": ONE.record(), "rate": 0.25, "strength": None}
    assert strength.record() == {"tokens": TWO.record(), "rate": None, "strength": -2.0}
    for value in (MAX_STRENGTH, -MAX_STRENGTH, 0.0):
        assert Goal(ONE, strength=value).strength == value
    assert Goal(ONE, 0.0).rate == 0


def test_goals_that_are_refused():
    for options in ({}, {"rate": 0.5, "strength": 1.0}, {"rate": 0.0, "strength": 0.0}):
        refused("give either `goal.rate` or `goal.strength`, and not both", lambda o=options: Goal(ONE, **o))
    for rate in (1.0, -0.1):
        refused(f"`goal.rate` must be at least 0 and below 1; got {rate:g}", lambda r=rate: Goal(ONE, r))
    for value in (60.5, -61.0, float("nan")):
        refused(f"`goal.strength` must be between -60 and 60; got {value}", lambda v=value: Goal(ONE, strength=v))


def test_tilted_target():
    both = TiltedTarget((Goal(ONE, 0.25), Goal(TWO, 0.5)))
    assert both.rates == [0.25, 0.5]
    assert both.tokens is ONE
    assert both.record() == {"kind": "tilted", "goals": [goal.record() for goal in both.goals]}
    assert both.members().dtype == torch.float32
    assert both.members().tolist() == [[0, 1, 0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0]]
    assert both.members("meta").device.type == "meta"
    assert TiltedTarget.of(ONE, 0.25).goals == (Goal(ONE, 0.25),)
    alone = TiltedTarget.of(TWO, strength=1.5)
    assert alone.goals == (Goal(TWO, strength=1.5),)
    assert alone.rates is None


def test_tilted_targets_that_are_refused():
    for goals, message in (
        ((), "a tilted target needs at least one goal"),
        ((Goal(ONE, 0.1), Goal(TokenSet((1,), 6), 0.1)), "all goals must be sets of one vocabulary"),
        ((Goal(ONE, 0.1), Goal(ONE, 0.2)), "two goals mean the same tokens; drop one"),
        ((Goal(ONE, 0.1), Goal(TWO, strength=1.0)), "give every goal a rate, or every goal a strength"),
    ):
        refused(message, lambda g=goals: TiltedTarget(g))


UNIFORM, RATE, STRENGTH = UniformTarget(ONE), TiltedTarget.of(ONE, 0.1), TiltedTarget.of(ONE, strength=1.0)
PLAIN, WHOLE_TEXTS, NEAR_BASE = (
    ObjectiveOptions(),
    ObjectiveOptions(sequence_level=True),
    ObjectiveOptions(kl_to_base=0.5),
)
HEAD, FULL = LoraOptions(target="head"), TrainOptions(method="full")


def test_what_a_target_asks_for_by_itself():
    asked = ObjectiveOptions(contexts="random")
    assert [target.contexts(PLAIN) for target in (UNIFORM, RATE)] == ["random", "self"]
    assert [target.contexts(ObjectiveOptions(contexts="self")) for target in (UNIFORM, RATE)] == ["self", "self"]
    assert RATE.contexts(asked) == "random"
    assert UNIFORM.default_lora(PLAIN) == LoraOptions()
    assert [RATE.default_lora(objective).target for objective in (PLAIN, WHOLE_TEXTS)] == ["head", "all,head"]
    assert RATE.needs_teacher(PLAIN) is True
    assert [UNIFORM.needs_teacher(objective) for objective in (PLAIN, NEAR_BASE)] == [False, True]


@pytest.mark.parametrize(
    ("target", "train", "lora", "objective", "message"),
    [
        (UNIFORM, TrainOptions(), LoraOptions(), WHOLE_TEXTS, "`sequence_level=True` needs `goal.rate`"),
        (UNIFORM, TrainOptions(), HEAD, PLAIN, "`lora.target=head` needs `goal.rate`, `goal.strength` or `goal`"),
        (UNIFORM, FULL, LoraOptions(), NEAR_BASE,
         "`kl_to_base` needs `method=lora`: without an adapter to switch off there is no base"),
        (RATE, FULL, HEAD, PLAIN, "a rate needs `method=lora`: with `method=full` there is no base left to be tilted"),
        (RATE, TrainOptions(), LoraOptions(variant="pissa"), PLAIN,
         "`lora.variant=pissa` takes a part out of the base, which a rate needs whole"),
        (RATE, TrainOptions(), HEAD, NEAR_BASE,
         "`kl_to_base` belongs to the uniform target; a rate stays nearest the base as it is"),
        (STRENGTH, TrainOptions(), HEAD, WHOLE_TEXTS, "`sequence_level=True` needs `goal.rate`, not `goal.strength`"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_with_a_target(target, train, lora, objective, message):
    refused(message, lambda: target.check(train, lora, objective))


@pytest.mark.parametrize("where", [{"temperature": 0.7}, {"top_k": 40}, {"top_p": 0.9}, {"prompts": __file__}])
def test_planning_without_a_head_has_one_decoding_and_its_own_openings(where):
    elsewhere = ObjectiveOptions(sequence_level=True, rate=RateOptions(**where))
    refused(
        "`sequence_level=True` without a set head holds its rate at temperature 1 after the model's own openings; add "
        "`head` to `lora.target`, or leave out `prompts`, `temperature`, `top_k` and `top_p`",
        lambda: RATE.check(TrainOptions(), LoraOptions(target="all"), elsewhere),
    )
    RATE.check(TrainOptions(), LoraOptions(target="all,head"), elsewhere)
    RATE.check(TrainOptions(), LoraOptions(target="all"), ObjectiveOptions(rate=RateOptions(**where)))
    on_average = ObjectiveOptions(sequence_level=True, rate=RateOptions("on-average"))
    RATE.check(TrainOptions(), LoraOptions(target="all"), on_average)


def test_a_head_alone_has_nothing_to_plan_with():
    """The states that it looks at are the base's, so the phase has no gradient."""
    refused(
        "`sequence_level=True` plans with attention and MLP; use `lora.target=all,head`",
        lambda: RATE.check(TrainOptions(), HEAD, WHOLE_TEXTS),
    )


def test_options_that_go_with_a_target():
    UNIFORM.check(TrainOptions(), LoraOptions(), PLAIN)
    UNIFORM.check(TrainOptions(), LoraOptions(), NEAR_BASE)
    UNIFORM.check(FULL, LoraOptions(), PLAIN)
    RATE.check(TrainOptions(), LoraOptions(target="all,head"), WHOLE_TEXTS)
    STRENGTH.check(TrainOptions(), HEAD, PLAIN)
