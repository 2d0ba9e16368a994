"""A regular expression over many texts, in a process that ends by a deadline: no pattern can hang the caller.

`re` backtracks and cannot be stopped from inside. The package `regex` can, but reads \\w and \\s otherwise (1,485 of
the first 12,288 code points differ) and hangs where it compiles nested counts; re2 has ASCII classes and no
lookahead. So `re` itself searches, in a child.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from ..errors import XFactorError

SECONDS = 20.0
"""For the whole vocabulary; an ordinary pattern takes a tenth of a second for 250,000 tokens."""
LONGEST = 10_000
"""Characters of a pattern."""
_CHILD = """
import json, re, sys
pattern, flags, texts = json.loads(sys.stdin.buffer.read())
try:
    search = re.compile(pattern, flags).search
    answer = [place for place, text in enumerate(texts) if search(text)]
except (re.error, RecursionError, OverflowError, MemoryError) as error:
    answer = str(error) or type(error).__name__
sys.stdout.buffer.write(json.dumps(answer).encode())
"""


def found_in(pattern: str, texts: Sequence[str], *, ignore_case: bool = False) -> list[int]:
    """Places of the texts in which the pattern is found, exactly as `re.search` finds it.

    Raises:
        XFactorError: no regular expression, one longer than `LONGEST`, or one that takes longer than `SECONDS`.
    """
    if len(pattern) > LONGEST:
        raise XFactorError(f"`regex` has {len(pattern)} characters; at most {LONGEST} are taken")
    asked = json.dumps([pattern, int(re.IGNORECASE) if ignore_case else 0, list(texts)]).encode()
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD], input=asked, capture_output=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise XFactorError(
            f"`regex` {_shown(pattern)} takes more than {SECONDS:g} s over the vocabulary; write it with fewer repeats"
        ) from error
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        raise XFactorError(f"`regex` {_shown(pattern)} ended its search with status {done.returncode}") from error
    if isinstance(answer, str):
        raise XFactorError(f"`regex` {_shown(pattern)} is not a regular expression: {answer}")
    return answer


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 60 else f"{pattern[:57]}...")
