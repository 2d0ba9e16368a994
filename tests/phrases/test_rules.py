"""Rates, goals and rule files: what they say, and that they say it again."""

import json

import pytest

from xfactor_peft.cli.phrases import _as_goal
from xfactor_peft.errors import XFactorError
from xfactor_peft.phrases.goals import PhraseTarget, Wanted, is_phrase_goal, parse_phrase_goal
from xfactor_peft.phrases.lists import overused, writing_prompts
from xfactor_peft.phrases.reference import like, measure
from xfactor_peft.phrases.rules import parse_rules, read_rules
from xfactor_peft.tokens.patterns import phrases

FILE = """
goals:
  - phrases: [tapestry, "delv*"]
    rate: x0.1
  - chars: "—;"
    rate: 2.0/1000w
  - script: [Han, Cyrillic]
    rate: 0
prompts: [one, two, three, four]
chat: off
options: {texts: 8, seed: 3}
"""


def test_rates():
    assert Wanted.parse("x0.1") == Wanted(0.1, "x")
    assert Wanted.parse("2.0/1000w") == Wanted(2.0, "w")
    assert Wanted.parse("3/1000t") == Wanted(3.0, "t")
    assert Wanted.parse("0") == Wanted(0.0)
    for wrong in ("", "1", "x", "-1/1000w", "2/100w", "xnan", "x-1", "xinf"):
        with pytest.raises(XFactorError):
            Wanted.parse(wrong)


def test_goals_of_the_command_line(tmp_path):
    (tmp_path / "slop.txt").write_text("tapestry\n# no\na testament to\n")
    goal = parse_phrase_goal(f"phrases:{tmp_path / 'slop.txt'}=x0.1")
    assert [p.text for p in goal.patterns] == ["a testament to", "tapestry"]
    assert goal.wanted == Wanted(0.1)
    assert [p.text for p in parse_phrase_goal("chars:—==0").patterns] == ["—", "="]
    assert parse_phrase_goal("script:Han,Cyrillic=0").hard
    assert not parse_phrase_goal("phrase:king=0").hard
    assert is_phrase_goal("script:Han=0")
    assert not is_phrase_goal("words:f.txt=0.1")
    with pytest.raises(XFactorError, match="KIND:VALUE=RATE"):
        parse_phrase_goal("phrases:slop.txt")


def test_small_rates_say_themselves_again():
    for rate in (Wanted(5e-5, "w"), Wanted(3e-7, "t"), Wanted(5e-5), Wanted(2.0, "w")):
        assert Wanted.parse(rate.text()) == rate


@pytest.mark.parametrize(
    "part", [{"prompts": [{"Continue": "The ship"}]}, {"goals": [{"phrases": [True], "rate": 0}]},
             {"goals": [{"chars": [7], "rate": 0}]}, {"prompts": ["a"], "held_out": [1]}]
)  # fmt: skip
def test_what_yaml_reads_as_no_text_is_refused(part):
    rules = {"goals": [{"phrases": ["king"], "rate": 0}], **part}
    with pytest.raises(XFactorError, match="put that into quotes"):
        parse_rules(rules)


def test_numbers_are_numbers_however_they_are_written(tmp_path):
    (tmp_path / "rules.yaml").write_text(FILE.replace("seed: 3", "lr: 1e-3"))
    assert read_rules(tmp_path / "rules.yaml").options.lr == 1e-3
    record = {"format": 1, "rules": {**read_rules(tmp_path / "rules.yaml").record()}}
    record["rules"]["options"]["lr"] = 5e-5
    (tmp_path / "xfactor.json").write_text(json.dumps(record))
    assert read_rules(tmp_path / "xfactor.json").options.lr == 5e-5
    with pytest.raises(XFactorError, match="chat"):
        parse_rules({"goals": [{"phrases": ["king"], "rate": 0}], "chat": ["on"]})


def test_a_rate_that_is_none_is_no_part_of_the_characters():
    """They would all be banned."""
    for text in ("—=10%", "—=0.5"):
        with pytest.raises(XFactorError, match="no rate of phrases"):
            _as_goal("chars", text)
    assert _as_goal("chars", "—=") == "chars:—==0"
    assert _as_goal("chars", "—=x0.5") == "chars:—=x0.5"


def test_a_pattern_belongs_to_one_goal():
    goals = tuple(parse_phrase_goal(f"phrase:king={rate}") for rate in ("0", "x2"))
    with pytest.raises(XFactorError, match="leave it in one"):
        PhraseTarget(goals)


def test_a_rule_file_says_the_same_from_its_record(tmp_path):
    (tmp_path / "rules.yaml").write_text(FILE)
    rules = read_rules(tmp_path / "rules.yaml")
    assert (rules.prompts, rules.held_out) == (("one", "three"), ("two", "four"))
    assert (rules.chat.mode, rules.options.texts) == ("off", 8)
    (tmp_path / "xfactor.json").write_text(json.dumps({"format": 1, "rules": rules.record()}))
    assert read_rules(tmp_path / "xfactor.json") == rules


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"goal": []}, "knows no 'goal'"),
        ({"goals": [{"phrases": ["a"]}]}, "has no rate"),
        ({"goals": [{"phrases": ["a"], "chars": "b", "rate": 0}]}, "exactly one of"),
        ({"goals": [{"phrases": ["a"], "rate": "often"}]}, "no rate of phrases"),
        ({"goals": [{"phrases": ["a"], "rate": 0, "case": 1}]}, "knows no 'case'"),
        ({"options": {"texts": 1}}, "at least 4"),
        ({"options": {"temperature": 1}}, "knows no 'temperature'"),
        ({"prompts": "missing.txt"}, "cannot be read"),
        ({"chat": "maybe"}, "must be one of"),
    ],
)
def test_what_a_rule_file_cannot_say(change, message):
    with pytest.raises(XFactorError, match=message):
        parse_rules({"goals": [{"phrases": ["king"], "rate": 0}], **change})


def test_the_bundled_list():
    patterns = overused()
    assert 180 <= len(patterns) <= 220
    assert sum(" " in p.text for p in patterns) > 60
    assert len(overused(add=["zeugma"], keep=["tapestry"])) == len(patterns)
    with pytest.raises(XFactorError, match="not in the list"):
        overused(keep=["zeugma"])
    fit, held_out = writing_prompts()
    assert (len(fit), len(held_out)) == (32, 32)
    assert not set(fit) & set(held_out)


def test_rates_of_a_text(tmp_path):
    text = "the king and the queen went out " * 400 + "a unicorn"
    (tmp_path / "human.txt").write_text(text)
    king, unicorn, zeugma = measure(tmp_path / "human.txt", phrases(["king", "unicorn", "zeugma"]))
    assert (king.count, unicorn.count, zeugma.count) == (400, 1, 0)
    assert king.rate == pytest.approx(1000 / 7, rel=0.02)
    for one in (king, unicorn, zeugma):
        assert one.interval[0] < one.rate < one.interval[1]
    assert 0 < zeugma.rate < unicorn.rate < king.rate
    assert len(like(tmp_path / "human.txt", phrases(["king", "queen"]))[0].goals) == 2
    (tmp_path / "short.txt").write_text("a king")
    with pytest.raises(XFactorError, match="too few"):
        measure(tmp_path / "short.txt", phrases(["king"]))
    with pytest.raises(XFactorError, match="none of the patterns"):
        measure(tmp_path / "human.txt", phrases(["zeugma"]))
