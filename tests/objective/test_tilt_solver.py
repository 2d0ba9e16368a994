"""Solving for strengths at the edges: masses of 0 and 1, steps that overshoot, dtypes, and what is refused."""

from __future__ import annotations

import math
import re

import pytest
import torch

from xfactor_peft.errors import XFactorError
from xfactor_peft.objective.tilt import SUPPRESS, Atoms, solve_rates, tilted_atoms

ONE_SET = torch.tensor([[0.0], [1.0]], dtype=torch.float64)


def contexts(*masses):
    """(N, 2) masses of the two atoms of one set."""
    m = torch.tensor(masses, dtype=torch.float64)
    return torch.stack([1 - m, m], dim=1)


def logit(p):
    return math.log(p / (1 - p))


def test_a_set_without_mass():
    message = "the model gives the set no mass at all, so no tilt can reach a rate; choose another set"
    with pytest.raises(XFactorError, match=f"^{re.escape(message)}$"):
        solve_rates(contexts(0.0, 0.0), ONE_SET, [0.5])
    assert solve_rates(contexts(0.0, 0.0), ONE_SET, [0.0]).item() == SUPPRESS
    assert solve_rates(contexts(0.0, 0.5), ONE_SET, [0.25]).item() == pytest.approx(0, abs=1e-6)  # one is enough


@pytest.mark.parametrize(("mass", "rate"), [(0.01, 0.03), (1e-6, 0.999), (0.999, 0.001), (0.5, 0.5)])
def test_newton_from_far_away(mass, rate):
    """From 1 % to 3 % the first step is 2.0, beyond the minimum by so much that the dual rises: it is halved."""
    (strength,) = solve_rates(contexts(mass), ONE_SET, [rate])
    reached = tilted_atoms(contexts(mass), ONE_SET, strength[None])[0, 1].item()
    assert reached == pytest.approx(rate, abs=1e-9)
    assert strength.item() == pytest.approx(logit(rate) - logit(mass), rel=1e-5)


def test_a_rate_of_zero_is_fixed_and_the_others_are_solved_given_it():
    members = torch.zeros(2, 20)
    members[0, :8], members[1, 5:12] = 1, 1
    atoms = Atoms.of(members)
    masses = atoms.masses(torch.randn(9, 20, generator=torch.Generator().manual_seed(0)).log_softmax(1))
    strengths = solve_rates(masses, atoms.patterns, [0.3, 0.0])
    assert strengths.dtype == torch.float64
    assert strengths[1] == SUPPRESS
    reached = (tilted_atoms(masses, atoms.patterns, strengths) @ atoms.patterns).mean(0)
    assert reached[0].item() == pytest.approx(0.3, abs=1e-9)
    assert reached[1] < 1e-7
    assert solve_rates(masses, atoms.patterns, [0.0, 0.0]).tolist() == [SUPPRESS, SUPPRESS]


def test_a_strength_beyond_the_largest_is_refused():
    """1e-30 at rate 1/2 needs 69; two disjoint sets cannot make up more than the whole."""
    message = (
        "no tilt gives the rates {} together: a token counts for every set it is in, so rates of disjoint sets must "
        "sum to less than 1 and a set's rate cannot exceed that of one that holds it"
    )
    assert solve_rates(contexts(1e-20), ONE_SET, [0.5]).item() == pytest.approx(-logit(1e-20), abs=1e-6)
    with pytest.raises(XFactorError, match=f"^{re.escape(message.format('0.5'))}$"):
        solve_rates(contexts(1e-30), ONE_SET, [0.5])
    three = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    with pytest.raises(XFactorError, match=f"^{re.escape(message.format('0.75, 0.5'))}$"):
        solve_rates(torch.full((2, 3), 1 / 3), three, [0.75, 0.5])


def test_atoms_on_the_device_of_the_probabilities():
    atoms = Atoms.of(torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0]]))
    out = atoms.masses(torch.zeros(3, 4, device="meta"))
    assert (out.device.type, out.shape, out.dtype) == ("meta", (3, 3), torch.float64)
