"""What ends a text, what is special and what pads: the one answer, from tokenizer and generation settings together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # which takes seconds to import


def special_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> set[int]:
    """Ids that stand for no text: EOS, BOS, padding, chat markers and the like.

    With a model: its ends too, and only ids that it has.

    A token that serves as padding and is otherwise ordinary ("!" in some checkpoints) stays text.
    """
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = (added | set(tokenizer.all_special_ids)) - _ordinary_padding(tokenizer)
    if model is None:
        return special
    size = model.get_output_embeddings().weight.shape[0]
    return {i for i in special if i < size} | set(end_ids(tokenizer, model))


def end_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    """Every id after which a text is over, sorted: the tokenizer's EOS and all that `generation_config` names."""
    named = [tokenizer.eos_token_id, *_listed(_setting(model, "eos_token_id"))]
    size = model.get_output_embeddings().weight.shape[0]
    return sorted({i for i in named if i is not None and 0 <= i < size})


def pad_id(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """What fills a batch's unequal rows: the padding token of the tokenizer, of the model, an end, or 0; masked."""
    ends = end_ids(tokenizer, model)
    known = [tokenizer.pad_token_id, *_listed(_setting(model, "pad_token_id")), *ends, 0]
    size = model.get_output_embeddings().weight.shape[0]
    return next(i for i in known if i is not None and 0 <= i < size)


def until_end(ids: list[int], ends: list[int]) -> list[int]:
    """The ids before the first end."""
    return ids[: next((place for place, i in enumerate(ids) if i in ends), len(ids))]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    """Ids of a text that goes on: with what the tokenizer puts before it (BOS), without what it puts behind (EOS)."""
    ids, behind = tokenizer(text, **options)["input_ids"], _put_behind(tokenizer)
    return ids[: len(ids) - behind]


def _put_behind(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the tokenizer puts after every text, seen on a short one."""
    whole, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    fits = [start for start in range(len(whole) - len(plain) + 1) if whole[start : start + len(plain)] == plain]
    return len(whole) - fits[0] - len(plain) if fits and plain else 0


def _setting(model: PreTrainedModel, name: str) -> Any:
    return getattr(getattr(model, "generation_config", None), name, None)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _ordinary_padding(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The padding token, when it has no other role and its text is that of an ordinary entry: no name in brackets."""
    text = tokenizer.pad_token
    others = {str(token) for role, token in tokenizer.special_tokens_map.items() if role != "pad_token"}
    if not text or text in others or (text[0] in "<[{" and text[-1] in ">]}") or "pad" in text.lower():
        return set()
    return {tokenizer.pad_token_id}
