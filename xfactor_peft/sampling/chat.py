"""Prompts as questions to a chat model: the tokenizer's own chat template puts them into roles."""

from __future__ import annotations

from itertools import cycle
from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import XFactorError
from ..options import ChatOptions


def chat_used(tokenizer: PreTrainedTokenizerBase, chat: ChatOptions) -> bool:
    """Whether prompts go through the chat template.

    Raises:
        XFactorError: it is asked for, or a system message is given, and the tokenizer has none.
    """
    has = getattr(tokenizer, "chat_template", None) is not None
    if chat.mode == "on" and not has:
        raise XFactorError("`chat=on` needs a tokenizer with a chat template, which this model has not")
    if chat.system is not None and not has:
        raise XFactorError("`system` needs a tokenizer with a chat template, which this model has not; leave it out")
    return has and chat.mode != "off"


def question(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: ChatOptions) -> list[int]:
    """Ids of a conversation up to where the answer begins: the system's message, earlier turns, and the user's prompt.

    Raises:
        XFactorError: the template refuses, e.g. because it knows no system's role.
    """
    turns = zip(cycle(("user", "assistant")), (*chat.earlier, prompt), strict=False)
    roles = [("system", chat.system), *turns]
    messages = [{"role": role, "content": text} for role, text in roles if text is not None]
    try:
        text = cast(str, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ValueError, TypeError) as error:
        raise XFactorError(f"the tokenizer's chat template refuses: {error}; pass `chat=off` for plain text") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written them itself


def chat_text(tokenizer: PreTrainedTokenizerBase, chat: ChatOptions) -> str:
    """In words, for people."""
    if chat_used(tokenizer, chat):
        return "prompts go through its chat template"
    return "prompts are plain text" if getattr(tokenizer, "chat_template", None) is None else "its chat template is off"
