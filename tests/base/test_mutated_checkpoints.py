"""A sample of docs/reliability.md's mutated checkpoints: read as transformers reads them, or refused in one line."""

import random
import shutil

import fuzz_checkpoints as fuzz
import pytest

KIND = "llama"


@pytest.fixture(scope="module")
def untouched(tiny_folders):
    return fuzz.ours(tiny_folders[KIND])


@pytest.mark.parametrize("cases", [fuzz.field_cases, fuzz.tensor_cases, fuzz.index_cases])
def test_no_mutation_is_silently_wrong(tiny_folders, tmp_path, untouched, cases):
    found = list(cases(KIND, tiny_folders[KIND]))
    outcomes = {}
    for case in random.Random(0).sample(found, min(14, len(found))):
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_folders[KIND], folder)
        case.change(folder)
        outcomes[case.name] = fuzz.judged(case, folder, untouched)
    assert {name: outcome for name, outcome in outcomes.items() if outcome.startswith("WRONG")} == {}
    assert "refused" in outcomes.values()


def test_the_judge_can_say_that_something_is_wrong(tiny_folders, untouched):
    """The controls: a folder that ought to be refused and is not, and another model's scores."""
    spoilt = fuzz.Case(KIND, "nothing", "refused", lambda folder: None)
    assert fuzz.judged(spoilt, tiny_folders[KIND], untouched) == "WRONG: loaded"
    measured = fuzz.Case(KIND, "nothing", "measure", lambda folder: None)
    assert fuzz.judged(measured, tiny_folders[KIND], untouched) == "not affected"
    assert fuzz.judged(measured, tiny_folders["gpt2"], untouched).startswith("WRONG")
