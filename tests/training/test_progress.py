"""Signs of life: every phase of a run says what it is doing and how far it is."""

from collections import defaultdict

from xfactor_peft.cli.progress import TrainingProgress
from xfactor_peft.objective.targets import TiltedTarget, UniformTarget
from xfactor_peft.options import EvalOptions, ObjectiveOptions, SamplingOptions, TrainOptions
from xfactor_peft.progress import Progress, listening, phase
from xfactor_peft.tokens.token_set import TokenSet
from xfactor_peft.training.train import train

SCORES = EvalOptions(("Once upon a time", "The fox"), 2, SamplingOptions(max_new_tokens=6))


def heard(base, target, **more):
    """Every phase with the shares that it reported."""
    found = defaultdict(list)
    with listening(lambda name, done, total: found[name].append((done, total))):
        train(base, target, TrainOptions(steps=2, batch_size=2, seq_len=8), None, SCORES, **more)
    return found


def counts_up(reports):
    done, total = reports[-1]
    assert done == total > 0
    assert [share for share, _ in reports] == sorted(share for share, _ in reports)
    assert len(reports) > 4


def test_every_phase_of_a_rate_counts_up(tiny):
    tokens = TokenSet.contains(tiny.tokenizer, "X", vocab_size=tiny.vocab_size)
    found = heard(tiny, TiltedTarget.of(tokens, 0.3))
    first = [
        "R before",
        "drawing openings",
        "fitting the set head, round 1 of 4",
        "fitting the set head, round 2 of 4",
    ]
    assert list(found)[: len(first)] == first
    assert "R after" in found
    for reports in found.values():
        counts_up(reports)
    assert found["R before"][-1] == (4, 4)


def test_contexts_of_the_model_itself_count_up(tiny):
    tokens = TokenSet.contains(tiny.tokenizer, "X", vocab_size=tiny.vocab_size)
    found = heard(tiny, UniformTarget(tokens), objective=ObjectiveOptions(contexts="self"))
    assert list(found) == ["R before", "drawing contexts", "R after"]
    assert found["drawing contexts"][-1] == (256, 256)


def test_a_pipe_gets_a_line_a_phase(capsys):
    with TrainingProgress(0):
        for name in ("first", "second"):
            with phase(name):
                part = Progress(0, 8, 8)
                for done in range(8):
                    part.report(done / 8)
    assert capsys.readouterr().out.splitlines() == ["first", "second"]
