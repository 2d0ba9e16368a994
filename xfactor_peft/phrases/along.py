"""What a text itself says of the words that it went on with.

`values` knows how an occurrence goes on from a state on average. Along a text that was drawn, the base's probabilities
at the next position are known as well, so the weight of the token that came is this context's own:

    w_t = f(c_t) g_{t+1},      g_t = 1 + sum over R(s_t) of p(i | context) (w(s_t, i) - 1),

where w(s_t, i) is the average, and w_t itself for the token that came. Where an occurrence only waits for a word's end,
g is the average.
"""

from __future__ import annotations

import numpy as np
import torch

from ..base.split_model import SplitModel
from ..lowmem.gguf_layers import PackedMatrix
from ..objective.tilt import SUPPRESS
from ..tokens.automaton import places_in
from .texts import Texts
from .values import Values


def weights_along(policy: SplitModel, texts: Texts, values: Values) -> np.ndarray:
    """log w_t of every drawn token, (N, L), float32; 0 where it leads into no occurrence and ends none."""
    ahead, through, factor = _parts(policy, texts, values)
    log_w, following = np.zeros(texts.states.shape, np.float32), _last(texts, values)
    for t in reversed(range(texts.states.shape[1])):
        w = np.where(np.isnan(factor[:, t]), 1.0, factor[:, t] * following)
        log_w[:, t] = np.log(np.maximum(w, 1e-9))
        average = values.worth(texts.states[:, t])
        following = np.where(np.isnan(ahead[:, t]), average, ahead[:, t] + through[:, t] * w)
    return np.maximum(log_w, SUPPRESS)


def _parts(policy: SplitModel, texts: Texts, values: Values) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(g but for the token that came, NaN where it is the average; that token's p if it is of R; f of it, NaN where it
    leads into no occurrence and ends none), (N, L) each."""
    automaton, shape = values.automaton, texts.states.shape
    ahead, through, factor = np.ones(shape), np.zeros(shape), np.full(shape, np.nan)
    ids, inside = texts.ids.numpy(), automaton.automaton.inside
    for state in np.unique(texts.states):
        at = np.nonzero(texts.states == state)
        came = ids[at]
        steps = {i: automaton.step(int(state), i) for i in np.unique(came).tolist()}
        factor[at] = [values.factor(steps[i][1]) if steps[i][1] or inside(steps[i][0]) else np.nan for i in came]
        if not inside(int(state)):
            continue
        row = automaton.row(int(state))
        if row.waiting:
            ahead[at] = np.nan
            continue
        p = probabilities(policy, texts, at, row.ids)
        gain = p * (values.row(int(state))[0] - 1)
        place, hit = places_in(row.ids, came)
        own = np.arange(len(came))[hit], place[hit]
        ahead[at] = 1 + gain.sum(1)
        ahead[at[0][hit], at[1][hit]] -= gain[own] + p[own]
        through[at[0][hit], at[1][hit]] = p[own]
    return ahead, through, factor


def probabilities(policy: SplitModel, texts: Texts, at: tuple[np.ndarray, ...], ids: np.ndarray) -> np.ndarray:
    """The base's p(i | context) at some positions, (n, ids)."""
    places, wanted = tuple(map(torch.from_numpy, at)), torch.from_numpy(ids)
    weight, bias = policy.weight, policy.bias
    rows = weight.rows(wanted) if isinstance(weight, PackedMatrix) else weight[wanted.to(weight.device)]
    z = texts.hidden[places].to(rows) @ rows.detach().T
    z = z.float() if bias is None else z.float() + bias.detach()[wanted.to(bias.device)].float()
    return (z.cpu() - texts.log_z[places][:, None]).exp().double().numpy()


def _last(texts: Texts, values: Values) -> np.ndarray:
    """g where the texts stop, (N,)."""
    step = values.automaton.step
    ends = zip(texts.states[:, -1].tolist(), texts.ids[:, -1].tolist(), strict=True)
    return values.worth(np.array([step(state, i)[0] for state, i in ends]))
