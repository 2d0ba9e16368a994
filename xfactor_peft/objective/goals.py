"""Goals as the command line writes them: "contains:X=0.10", "regex:^ ?[Zz]=0.05", "words:FILE=0.02"."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from ..errors import XFactorError
from ..options import parse_rate
from ..tokens.rule import KINDS, Rule
from ..tokens.token_set import TokenSet
from .targets import Goal


def parse_goal(
    text: str, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int | None = None, ignore_case: bool = False
) -> Goal:
    """KIND:VALUE=RATE, where the value may itself hold ":" and "="; words and token-ids name a file or list
    them (a,b), and a rate may be written as 10%.

    Raises:
        XFactorError: the text has another form, the rate is not a number in [0, 1), or the set is not possible.
    """
    kind, colon, rest = text.partition(":")
    value, equals, number = rest.rpartition("=")
    if not (colon and equals and value) or kind not in KINDS:
        raise XFactorError(f"`goal` {text!r}: expected KIND:VALUE=RATE with KIND one of {', '.join(KINDS)}")
    try:
        rate = parse_rate(number)
    except XFactorError as error:
        raise XFactorError(f"`goal` {text!r}: {number!r} is not a rate between 0 and 1") from error
    if not 0 <= rate < 1:
        raise XFactorError(f"`goal` {text!r}: the rate must be at least 0 and below 1; got {number}")
    rule = Rule.read(kind, value, ignore_case=ignore_case and kind != "token-ids")
    return Goal(TokenSet.from_rule(tokenizer, rule, vocab_size=vocab_size), rate)
