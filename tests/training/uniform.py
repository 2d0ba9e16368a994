"""A short uniform run: what the tests of training, of runs and of loading start from."""

from xfactor_peft.objective.targets import UniformTarget
from xfactor_peft.options import EvalOptions, SamplingOptions
from xfactor_peft.tokens.token_set import TokenSet

QUICK = EvalOptions(("Once upon a time", "The fox"), 4, SamplingOptions(max_new_tokens=16))


def x_target(base, **levels):
    return UniformTarget(TokenSet.contains(base.tokenizer, "X", vocab_size=base.vocab_size), **levels)
