"""What no text came to is looked at: the probabilities are those of the model after these very tokens."""

import numpy as np
import torch

from tests.tiny import tiny_model, tiny_tokenizer
from xfactor_peft.base.split_model import split
from xfactor_peft.phrases import probes
from xfactor_peft.phrases.texts import Texts
from xfactor_peft.phrases.values import Statistics, Values
from xfactor_peft.tokens.automaton import TokenAutomaton
from xfactor_peft.tokens.patterns import phrases


def test_rare_patterns_are_written_into_the_texts():
    tokenizer, model = tiny_tokenizer(), tiny_model("gpt2").eval()
    policy, size = split(model), model.config.vocab_size
    automaton = TokenAutomaton(tokenizer, phrases(["zebra crossing", "unlikely*"]), size)
    ids = torch.tensor([tokenizer("the cat sat on the mat and the dog sat by it and so on")["input_ids"]])
    states = np.array([automaton.run(row)[0][:-1] for row in ids.tolist()])
    statistics = Statistics(automaton)
    for state in states[0]:
        statistics.add(np.array([state]), torch.full((1, size), 1 / size))
    texts = Texts([[1]], ids, states, torch.zeros(1, ids.shape[1], 2), torch.zeros(ids.shape), torch.zeros(ids.shape))
    before, natural = set(statistics.visits), sum(seen.natural for seen in statistics.visits.values())
    probed = list(probes._probes(tokenizer, statistics, texts, 0))
    assert probes.probe(policy, tokenizer, statistics, texts, 0) == len(probed) > 0
    new = set(statistics.visits) - before
    amid = {state for _, states in probed for state in states if automaton.automaton.inside(state)}
    assert new == amid - before
    assert sum(seen.natural for seen in statistics.visits.values()) == natural  # not a visit of the base's own
    state, expected = min(new), np.zeros(size)
    for context, states in probed:
        with torch.no_grad():
            p = model(torch.tensor([context])).logits[0].softmax(1).double().numpy()
        expected += sum(row for row, s in zip(p[len(context) - len(states) :], states, strict=True) if s == state)
    np.testing.assert_allclose(statistics.visits[state].masses, expected[automaton.row(state).ids], rtol=1e-4)
    assert probes.probe(policy, tokenizer, statistics, texts, 0) == 0  # now it is known
    assert Values(statistics, np.full(2, -np.inf)).worth(np.array([state]))[0] < 1
