"""Options that several commands share, and the objects they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import say
from .help import OTHER, grouped
from .values import Listed

if TYPE_CHECKING:
    from ..base.loading import Base
    from ..base.resolve import ModelChoice
    from ..base.vocabulary import Vocabulary
    from ..options import ChatOptions, LoadOptions, SamplingOptions
    from ..tokens.token_set import TokenSet

Command = Callable[..., Any]
OWNER = "owner"
"""Key of the options under which `own_base` names the adapter whose base it took."""


def apply_options(options: list[Command], function: Command, title: str = OTHER) -> Command:
    """Add options, which the help shows under `title`."""
    before = len(getattr(function, "__click_params__", []))
    for option in reversed(options):
        function = option(function)
    return grouped(function, title, before)


def model_options(function: Command, default: str | bool = True, dtype: str = "auto") -> Command:
    """--model, --revision, --offline, --dtype, --device, --load-in-8bit, --load-in-4bit, --quant-backend,
    --weights."""
    return apply_options(
        [
            click.option("--model", default="auto", show_default=default, metavar="NAME",
                         help="A Hub id, a folder, demo, or auto: GPT-2 Medium if it can be had, else demo."),
            click.option("--revision", help="Branch, tag or commit on the Hub."),
            click.option("--offline", is_flag=True, help="Never touch the network."),
            click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default=dtype, show_default=True,
                         help="auto: bf16 where the hardware is fast at it."),
            click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
            click.option("--load-in-8bit", is_flag=True, help="Quantise the blocks' weights to int8."),
            click.option("--load-in-4bit", is_flag=True, help="Quantise the blocks' weights to NF4."),
            click.option("--quant-backend", type=click.Choice(["auto", "native", "bitsandbytes"]), default="auto",
                         show_default=True, help="auto: native on a CPU, bitsandbytes on CUDA."),
            click.option("--weights", type=click.Choice(["auto", "memory", "mapped"]), default="auto",
                         show_default=True, help="Frozen weights in memory, or mapped from disk, where the system may "
                         "take them back; auto: mapped where the run would not fit."),
        ],
        _lean(function),
        "Model",
    )  # fmt: skip


def _lean(function: Command) -> Command:
    """The command, told what it loads before it imports anything: what that takes no part of is left out."""

    @wraps(function)
    def command(*args: Any, **flags: Any) -> Any:
        load_options(flags)
        return function(*args, **flags)

    return command


def adapter_model_options(function: Command) -> Command:
    """`model_options` of commands that may take an adapter, whose own base is the default."""
    return model_options(function, "the adapter's own base; without an adapter auto")


def base_options(function: Command, dtype: str = "auto") -> Command:
    """`model_options` of commands that must have an adapter."""
    return model_options(function, "the adapter's own base", dtype)


def own_token_options(function: Command) -> Command:
    """`token_options` of commands that take an adapter, whose own set is the default."""
    return token_options(function, "the adapter's own set; without one X")


def token_options(function: Command, default: str = "X") -> Command:
    """--contains, --regex, --words, --token-ids, --ignore-case."""
    return apply_options(
        [
            click.option("--contains", metavar="TEXT", help=f"Tokens that contain TEXT.  [default: {default}]"),
            click.option("--regex", metavar="PATTERN", help="Tokens in which PATTERN is found."),
            click.option("--words", type=Listed("words"), metavar="LIST|FILE",
                         help="Tokens that are one of these words: fox,dog, or a file with one a line; - is stdin."),
            click.option("--token-ids", type=Listed("token-ids"), metavar="LIST|FILE",
                         help="Exactly these ids: 5,17, or a file; - is stdin."),
            click.option("--ignore-case", is_flag=True, help="For --contains, --regex and --words."),
        ],
        function,
        "Which tokens",
    )  # fmt: skip


def sampling_options(function: Command) -> Command:
    """--max-new-tokens, --temperature, --top-k, --top-p, --seed."""
    return apply_options(
        [
            click.option("--max-new-tokens", default=64, show_default=True, help="Length of a continuation."),
            click.option("--temperature", default=1.0, show_default=True, help="0 is greedy."),
            click.option("--top-k", default=0, show_default=True, help="0 switches it off."),
            click.option("--top-p", default=1.0, show_default=True, help="1 switches it off."),
            click.option("--seed", default=0, show_default=True, help="Every prompt has random numbers of its own."),
        ],
        function,
        "Sampling",
    )


def chat_options(function: Command) -> Command:
    """--chat, --system."""
    return apply_options(
        [
            click.option("--chat", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True,
                         help="Put each prompt into the tokenizer's chat template; auto: where it has one."),
            click.option("--system", metavar="TEXT", help="The system's message of the chat."),
        ],
        function,
        "Chat",
    )  # fmt: skip


def adapters_dir_option(function: Command) -> Command:
    """--adapters-dir."""
    path = click.Path(path_type=Path)
    about = "The folder that holds adapters by name."
    return click.option("--adapters-dir", type=path, default="adapters", show_default=True, help=about)(function)


def load_options(flags: dict[str, Any], *, master_weights: bool = False) -> LoadOptions:
    """How the model options say to load, and libraries that this takes no part of kept out of memory.

    Raises:
        XFactorError: options that exclude each other.
    """
    from ..base.hardware import pick_device, quantized_by
    from ..errors import XFactorError
    from ..lowmem.imports import allow_bitsandbytes, leave_out_bitsandbytes
    from ..options import LoadOptions

    if flags["load_in_8bit"] and flags["load_in_4bit"]:
        raise XFactorError("--load-in-8bit and --load-in-4bit exclude each other; give one")
    quantization = "int8" if flags["load_in_8bit"] else "nf4" if flags["load_in_4bit"] else None
    options = LoadOptions(
        flags["dtype"], flags["device"], quantization, flags["quant_backend"], master_weights, flags["weights"]
    )
    by = quantized_by(options, pick_device(options.device))
    (allow_bitsandbytes if by == "bitsandbytes" else leave_out_bitsandbytes)()
    return options


def load(flags: dict[str, Any], about: Callable[[Base], str] | None = None) -> Base:
    """Load the base that the model options ask for; prints the line that names it, which `about` adds to."""
    from ..base.resolve import resolve_model

    options = load_options(flags)
    choice = resolve_model(flags["model"], offline=flags["offline"], revision=flags["revision"])
    if owner := flags.get(OWNER):
        choice = replace(choice, reason=f"the base of {owner}")
    return load_chosen(choice, options, about)


def load_chosen(
    choice: ModelChoice,
    options: LoadOptions,
    about: Callable[[Base], str] | None = None,
    vocabulary: Vocabulary | None = None,
) -> Base:
    """Load a model that was found; prints the line that names it."""
    from transformers.utils import logging

    from ..base.loading import load_base
    from .flags import as_flags

    logging.disable_progress_bar()
    base = load_base(choice, options, vocabulary)
    say(as_flags(base.describe()) + (f"; {about(base)}" if about else ""))
    return base


def load_to_generate(flags: dict[str, Any]) -> tuple[Base, ChatOptions]:
    """`load`, and how prompts are put; prints both, and what the checkpoint says of decoding, which is not used."""
    from ..options import ChatOptions
    from ..sampling.chat import chat_text
    from ..sampling.generation import unused_settings
    from .console import console

    chat = ChatOptions(flags["chat"], flags["system"])
    base = load(flags, lambda base: chat_text(base.tokenizer, chat))
    if unused := unused_settings(base.model):
        settings = ", ".join(f"{name} {value}" for name, value in unused.items())
        console.print(f"not used: the checkpoint's own decoding settings, {settings}", style="dim")
    return base, chat


def own_base(flags: dict[str, Any], references: Iterable[str], adapters_dir: Path) -> dict[str, Any]:
    """The model options, with the first adapter's own base in place of `auto`."""
    from ..adapters.adapter import find_adapter, list_adapters, read_adapter
    from ..adapters.mix import parse_mix

    known = list_adapters(adapters_dir)
    names = [name for reference in references for name in parse_mix(reference, known).names]
    if flags["model"] != "auto" or not names:
        return flags
    info = read_adapter(find_adapter(names[0], adapters_dir))
    if info.identity is None:
        named, revision = info.config.get("base_model_name_or_path"), info.config.get("revision")
    else:
        named, revision = info.identity.name, info.identity.revision
    if not named:
        return flags
    return {**flags, "model": named, "revision": flags["revision"] or revision, OWNER: names[0]}


def token_set(flags: dict[str, Any], base: Base | Vocabulary) -> TokenSet | None:
    """The set that the token options ask for, or None when none is given.

    Raises:
        XFactorError: more than one rule, or --ignore-case where it has no meaning.
    """
    from ..errors import XFactorError
    from ..tokens.rule import Rule
    from ..tokens.token_set import TokenSet

    given = [name for name in ("contains", "regex", "words", "token_ids") if flags[name] is not None]
    if len(given) > 1:
        raise XFactorError(f"give one of --{', --'.join(given).replace('_', '-')}, not {len(given)}")
    if not (given or flags["ignore_case"]):
        return None
    kind = given[0] if given else "contains"
    rule = Rule.read(kind.replace("_", "-"), flags[kind] if given else "X", ignore_case=flags["ignore_case"])
    return TokenSet.from_rule(base.tokenizer, rule, vocab_size=base.vocab_size)


def default_set(base: Base | Vocabulary) -> TokenSet:
    """Every token that contains "X"."""
    from ..tokens.token_set import TokenSet

    return TokenSet.contains(base.tokenizer, "X", vocab_size=base.vocab_size)


def sampling(flags: dict[str, Any]) -> SamplingOptions:
    """The sampling options as given."""
    from ..options import SamplingOptions

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    return SamplingOptions(**{name: flags[name] for name in names})
