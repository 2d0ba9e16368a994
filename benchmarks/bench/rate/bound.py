"""How little KL any policy could do with: two-sided bounds of log Z by twisted sequential Monte Carlo.

Of all policies q whose texts of T tokens hold R T set tokens on average, with a mean squared deviation of at most V,
each obeys, for every lambda and mu >= 0 and with f(c) = lambda c - mu (c - R T)^2 / 2 (Donsker and Varadhan):

    KL(q || p)  >=  lambda R T - mu V / 2 - log Z,      Z = E_p exp f(count(x)),

with equality for q(x) = p(x) exp f(count(x)) / Z where that has these moments. Several prompts: the mean of log Z. Left
without V the best policy writes some texts of nothing but the set, so V is what a measured policy has.

Z is a ratio of normalising constants that particles estimate without bias (Del Moral 2004; twists: Zhao et al. 2024,
"Probabilistic inference in language models via twisted sequential Monte Carlo", arXiv:2404.17546). So by Jensen's
inequality E log Z^ <= log Z, and with one of the particles drawn from q, E log Z^ >= log Z; a particle of the first run
stands for that one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from transformers import DynamicCache

import xfactor_peft as xf
from xfactor_peft.base.loading import Base
from xfactor_peft.base.split_model import split
from xfactor_peft.options import DEFAULT_PROMPTS
from xfactor_peft.sampling.generation import encode_prompt
from xfactor_peft.sampling.intervals import mean_interval
from xfactor_peft.tokens.ends import special_ids

from .. import store
from ..process import OnStep
from ..store import Record
from ..tables import Table

BOUND_TABLE = "bound.md"
LABELS = {"sequence": "sequence-level, no price", "sequence-w1": "sequence-level"}
LENGTH = 64
ROUNDS, PARTICLES, FINAL, REPEATS = 5, 48, 64, 3
RESAMPLED, STEP_PRICE = 0.5, 0.3


@dataclass(frozen=True)
class Potential:
    """f(c) = strength c - evenness (c - centre)^2 / 2, by the count c of set tokens in a text."""

    strength: float
    evenness: float
    centre: float

    def __call__(self, counts: torch.Tensor) -> torch.Tensor:
        return self.strength * counts - self.evenness / 2 * (counts - self.centre) ** 2

    def twists(self, length: int) -> torch.Tensor:
        """psi_t(c), (length + 1, length + 2): log E exp f(c + K) with K the tokens to come if each were in the set with
        the probability that `strength` tilts to the wanted rate; the last row is f."""
        counts = torch.arange(length + 2, dtype=torch.float64)
        rate = self.centre / length
        chance = torch.sigmoid(torch.tensor(math.log(rate / (1 - rate)) - self.strength, dtype=torch.float64))
        rows = [self(counts)]
        for _ in range(length):
            after = rows[-1]
            more = torch.cat([after[1:], after[-1:]])  # no text gets that far
            rows.append(torch.logaddexp(chance.log() + more, (-chance).log1p() + after))
        return torch.stack(rows[::-1])


@dataclass(frozen=True)
class Particles:
    """What one run of N particles left: log Z^, the ids (N, T), and their normalised weights (N,)."""

    log_z: float
    ids: torch.Tensor
    weights: torch.Tensor


class Texts:
    """N texts that grow by a token: ids and hits (N, T), whether a token is in the set."""

    def __init__(self, sampler: Sampler, start: torch.Tensor, count: int, seed: int) -> None:
        self._sampler, self._following, self._at = sampler, start.expand(count, -1), 0
        self._cache = DynamicCache(config=sampler.base.model.config)
        self.generator = torch.Generator().manual_seed(seed)
        self.ids = torch.empty(count, sampler.length, dtype=torch.long)
        self.hits = torch.zeros(count, sampler.length, dtype=torch.long)

    def draw(
        self, outside: torch.Tensor, inside: torch.Tensor, first: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a token of each text from p exp(psi) / Z(c), psi (N,) `outside` of the set and `inside`.

        The first text gets `first` if that is given. Returns log Z(c) and the set's mass in what is drawn from, (N,).
        """
        sampler, t = self._sampler, self._at
        trunk = sampler.base.model.base_model(input_ids=self._following, past_key_values=self._cache, use_cache=True)
        z = sampler.model.logits(trunk.last_hidden_state[:, -1].contiguous()).float()
        p = z.index_fill_(1, sampler.never, float("-inf")).softmax(1)
        mass = (p @ sampler.members).double()
        log_z = torch.logaddexp((1 - mass).clamp(min=1e-30).log() + outside, mass.clamp(min=1e-30).log() + inside)
        q = (inside - log_z).exp() * mass
        more, less = (q / mass.clamp(min=1e-30)).float(), ((1 - q) / (1 - mass).clamp(min=1e-30)).float()
        cumulative = p.mul_(torch.where(sampler.mask, more[:, None], less[:, None])).cumsum_(1)
        at = torch.rand(len(p), 1, generator=self.generator) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, at, right=True).squeeze(1).clamp(max=p.shape[1] - 1)
        if first is not None:
            drawn[0] = first
        self.ids[:, t], self.hits[:, t], self._following, self._at = drawn, sampler.mask[drawn], drawn[:, None], t + 1
        return log_z, q

    def choose(self, rows: torch.Tensor) -> None:
        """Go on with these texts."""
        self.ids, self.hits, self._following = self.ids[rows], self.hits[rows], self._following[rows]
        self._cache.reorder_cache(rows)


class Sampler:
    """Particles after prompts of one model, with the set and the tokens that are never drawn."""

    def __init__(self, base: Base, tokens: xf.TokenSet, length: int = LENGTH) -> None:
        self.length, self.base, self.model, self.mask = length, base, split(base.model), tokens.mask(base.device)
        self.members = self.mask.float()
        self.never = torch.tensor(sorted(special_ids(base.tokenizer, base.model)), dtype=torch.long)

    @torch.no_grad()
    def run(self, prompt: str, f: Potential, count: int, seed: int, kept: torch.Tensor | None = None) -> Particles:
        """Particles of p exp f after `prompt`; with `kept` (T,) ids the first of them is that text."""
        texts, twists = self._begin(prompt, count, seed), f.twists(self.length)
        counts, weights, log_z = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.float64), 0.0
        for t in range(self.length):
            step, _ = texts.draw(twists[t + 1][counts], twists[t + 1][counts + 1], None if kept is None else kept[t])
            weights += step - twists[t][counts]
            counts = counts + texts.hits[:, t]
            if t + 1 < self.length and effective(weights) < RESAMPLED * count:
                log_z += float(weights.logsumexp(0)) - math.log(count)
                chosen = torch.multinomial(weights.softmax(0), count, replacement=True, generator=texts.generator)
                if kept is not None:
                    chosen[0] = 0
                texts.choose(chosen)
                counts, weights = counts[chosen], torch.zeros_like(weights)
        log_z += float(weights.logsumexp(0)) - math.log(count) + float(twists[0][0])
        return Particles(log_z, texts.ids, weights.softmax(0))

    @torch.no_grad()
    def tilted(
        self, prompt: str, f: Potential, count: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Texts of the logit bias f.strength: set masses and KL at every position, (N, T), and counts (N,)."""
        texts, found = self._begin(prompt, count, seed), []
        none, strength = torch.zeros(count, dtype=torch.float64), torch.full((count,), f.strength, dtype=torch.float64)
        for _ in range(self.length):
            log_z, mass = texts.draw(none, strength, None)
            found.append((mass, f.strength * mass - log_z))
        masses, kl = (torch.stack(parts, dim=1) for parts in zip(*found, strict=True))
        return masses, kl, texts.hits.sum(1)

    def _begin(self, prompt: str, count: int, seed: int) -> Texts:
        start = encode_prompt(self.base.tokenizer, self.base.model, prompt, self.length)
        return Texts(self, torch.tensor(start), count, seed)

    def counts(self, particles: Particles) -> torch.Tensor:
        """(T + 1,): the weight of texts by their count of set tokens."""
        counts = self.mask[particles.ids].sum(1)
        return torch.zeros(self.length + 1, dtype=torch.float64).index_add_(0, counts, particles.weights)


def effective(log_weights: torch.Tensor) -> float:
    """The effective number of particles: 1 / sum of squared normalised weights."""
    return float(1 / log_weights.softmax(0).square().sum())


def dual(histograms: torch.Tensor, log_z: torch.Tensor, f: Potential, variance: float) -> Potential:
    """The lambda and mu with the highest bound, from what was drawn under f.

    Histograms (prompts, T + 1) of counts and log Z (prompts,) give log Z(f') = log Z + log E exp(f' - f), which holds
    near f alone: a step away from it has a price.
    """
    counts = torch.arange(histograms.shape[1], dtype=torch.float64)
    start = torch.tensor([f.strength, math.log(f.evenness)], dtype=torch.float64)
    free = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([free], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        strength, evenness = free[0], free[1].exp()
        moved = strength * counts - evenness / 2 * (counts - f.centre) ** 2 - f(counts)
        z = (log_z + (histograms.log() + moved).logsumexp(1)).mean()
        value = z + evenness * variance / 2 - strength * f.centre + STEP_PRICE * (free - start).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    step = (free.detach() - start).nan_to_num().clamp(-1, 1)  # what was drawn says nothing of places further off
    strength, evenness = (start + step).tolist()
    return Potential(strength, math.exp(evenness), f.centre)


def tilted(sampler: Sampler, prompts: tuple[str, ...], strength: float, texts: int, seed: int) -> Record:
    """R, its standard deviation between texts, and KL of the exact logit bias, the latter with its interval."""
    even = Potential(strength, 0.0, 0.0)
    runs = [sampler.tilted(prompt, even, texts, seed + n) for n, prompt in enumerate(prompts)]
    masses, kl, counts = (torch.cat(parts) for parts in zip(*runs, strict=True))
    return {
        "rate": float(masses.mean()),
        "spread": float((counts / LENGTH - masses.mean()).square().mean().sqrt()),
        "kl": float(kl.mean()),
        "kl_interval": mean_interval(kl.float()),
    }


def least(sampler: Sampler, prompts: tuple[str, ...], rate: float, spread: float, on_step: OnStep) -> Record:
    """The bound at this R and spread, in nats a token, between its own bounds, with two standard errors of either; and
    what the best policy has."""
    variance = (spread * LENGTH) ** 2
    f = Potential(1.5 + 10 * rate, 0.5 / (rate * (1 - rate) * LENGTH), rate * LENGTH)
    for number in range(ROUNDS):
        runs = [sampler.run(prompt, f, PARTICLES, 1000 * number + n) for n, prompt in enumerate(prompts)]
        histograms = torch.stack([sampler.counts(run) for run in runs])
        f = dual(histograms, torch.tensor([run.log_z for run in runs], dtype=torch.float64), f, variance)
        on_step(number + 1, f.strength)
    below = [sampler.run(prompt, f, FINAL, 10_000 + n) for n, prompt in enumerate(prompts * REPEATS)]
    kept = [run.ids[int(torch.searchsorted(run.weights.cumsum(0), 0.5))] for run in below]  # drawn: order is chance
    pairs = enumerate(zip(prompts * REPEATS, kept, strict=True))
    above = [sampler.run(prompt, f, FINAL, 20_000 + n, ids) for n, (prompt, ids) in pairs]
    fixed = f.strength * f.centre - f.evenness * variance / 2
    (most, most_error), (fewest, fewest_error) = (_mean([run.log_z for run in runs]) for runs in (above, below))
    counts = torch.stack([sampler.counts(run) for run in below]).mean(0)
    at = torch.arange(LENGTH + 1, dtype=torch.float64)
    return {
        "low": (fixed - most - 2 * most_error) / LENGTH,
        "high": (fixed - fewest + 2 * fewest_error) / LENGTH,
        "strength": f.strength,
        "evenness": f.evenness,
        "best_rate": float(counts @ at) / LENGTH,
        "best_spread": math.sqrt(float(counts @ (at - f.centre) ** 2)) / LENGTH,
        "effective": mean(effective(run.weights.log()) for run in below),
    }


def _mean(log_z: list[float]) -> tuple[float, float]:
    """The mean over prompts and `REPEATS`, and its standard error: of the noise alone, not of how prompts differ."""
    runs = torch.tensor(log_z, dtype=torch.float64).view(REPEATS, -1)
    return float(runs.mean()), float((runs.var(0) / REPEATS).mean().div(runs.shape[1]).sqrt())


def measure(spec: Record, on_step: OnStep) -> Record:
    """The least KL of any policy with the R and spread of this one, on the prompts of `xfactor_peft.evaluate`.

    {"model", "contains"} and of the policy {"strength"}, where it is a logit bias, or what was measured of it: {"rate",
    "spread", "kl"}."""
    base = xf.load(spec["model"], xf.LoadOptions(dtype="fp32"), offline=True)
    tokens = xf.TokenSet.contains(base.tokenizer, spec["contains"], ignore_case=True, vocab_size=base.vocab_size)
    sampler, known = Sampler(base, tokens), {key: spec[key] for key in ("rate", "spread", "kl") if key in spec}
    policy = known or tilted(sampler, DEFAULT_PROMPTS, spec["strength"], FINAL, 30_000)
    on_step(0, 0.0)
    return {**policy, **least(sampler, DEFAULT_PROMPTS, policy["rate"], policy["spread"], on_step)}


def planned(folder: Path) -> dict[str, Record]:
    """What was measured of the policies that plan, over their seeds: {"rate", "spread", "kl"} by name."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in store.read_all(folder):
        spec = record.get("spec", record)
        if record["status"] == "ok" and spec["arm"].startswith("sequence") and spec["wanted"] in (0.1, 0.3):
            groups[f"{spec['arm']}-{spec['wanted']:g}"].append(record["after"])
    return {
        name: {
            "rate": mean(score["rate"] for score in scores),
            "spread": math.sqrt(mean(score["spread"] ** 2 for score in scores)),
            "kl": mean(score["kl_from_base"] for score in scores),
        }
        for name, scores in groups.items()
    }


def write(folder: Path) -> str:
    """Write bound.md into `folder` from the records in its folder `bound`; returns the table."""
    headers = ["policy", "R", "spread", "KL, nats/token", "no policy has less than", "× its KL"]
    found = sorted(store.read_all(folder / "bound"), key=lambda record: (record["spec"]["policy"], record["rate"]))
    lines = []
    for record in found:
        spec, low, high = record["spec"], record["low"], record["high"]
        name = f"logit bias of {spec['strength']:g}" if "strength" in spec else LABELS[spec["policy"].rsplit("-", 1)[0]]
        share, spread = (f"{record[key]:.{digits}f}" for key, digits in (("rate", 4), ("spread", 3)))
        bound = f"{low:.4f}–{high:.4f}", f"{low / record['kl']:.2f}–{high / record['kl']:.2f}"
        lines.append([name, share, spread, f"{record['kl']:.4f}", *bound])
    return store.write_text(folder / BOUND_TABLE, Table(headers, lines).markdown(aligned=False) + "\n")
