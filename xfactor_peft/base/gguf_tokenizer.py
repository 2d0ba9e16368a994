"""The tokenizer in a GGUF file: byte-level BPE with its way to split text, or SentencePiece's pieces; control and added
tokens; the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ..errors import XFactorError
from ..lowmem.gguf_file import GgufFile, read_gguf
from .gguf_pieces import pieces

_UNKNOWN, _CONTROL, _USER = 2, 3, 4
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
SPLITS = {"gpt-2": None, "default": None, "smollm": None, "llama-bpe": _LLAMA3, "qwen2": _QWEN2}
"""llama.cpp's names for ways to split text, with their regular expression where ByteLevel's own is not it."""
_KNOWN = {
    "model", "pre", "tokens", "token_type", "merges", "scores", "bos_token_id", "eos_token_id", "eot_token_id",
    "eom_token_id", "unknown_token_id", "padding_token_id", "seperator_token_id", "cls_token_id", "mask_token_id",
    "add_bos_token", "add_eos_token", "add_space_prefix", "add_sep_token",
}  # fmt: skip


def open_gguf(path: Path) -> GgufFile:
    """Raises XFactorError for a file that is none, or damaged."""
    try:
        return read_gguf(path)
    except (ValueError, OSError) as error:
        raise XFactorError(str(error)) from error


def tokenizer_of(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer.

    Raises:
        XFactorError: it is of another kind, or damaged.
    """
    fields = {
        key.removeprefix("tokenizer.ggml."): v for key, v in file.fields.items() if key.startswith("tokenizer.ggml.")
    }
    model, pre = fields.get("model"), fields.get("pre", "default")
    if model not in ("gpt2", "llama") or pre not in (SPLITS if model == "gpt2" else ("default",)):
        raise XFactorError(
            f"{file.path} has a tokenizer of the kind {model!r}, {pre!r}; read here are byte-level BPE (gpt2) that "
            f"splits text as one of {', '.join(SPLITS)}, and SentencePiece's (llama)"
        )
    if model == "llama" and "phi" in str(file.fields.get("general.name")).lower():
        raise XFactorError(f"{file.path}: the tokens of Phi's files that take spaces behind them are not supported")
    if unknown := sorted(fields.keys() - _KNOWN):
        raise XFactorError(f"{file.path}: tokenizer.ggml.{unknown[0]} is a field that is not known here")
    try:
        backend = _backend(fields, pre)
    except Exception as error:  # tokenizers raises plain Exceptions
        why = " ".join(str(error).split())[:200]
        raise XFactorError(f"{file.path} holds a damaged or unsupported tokenizer: {why}") from error
    tokens = fields["tokens"]
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{k}_token": tokens[i] for k, name in named.items() if (i := fields.get(f"{name}_token_id")) is not None
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    template = file.fields.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise XFactorError(f"{file.path} holds a damaged tokenizer: its chat template is no text")
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def ends_of(file: GgufFile) -> list[int]:
    """The ids that end a text: end of sequence, of turn, of message."""
    found = (file.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(i for i in found if i is not None))


def _backend(fields: dict[str, Any], pre: str) -> Tokenizer:
    tokens, kinds = fields["tokens"], fields.get("token_type")
    kinds = [1] * len(tokens) if kinds is None else kinds
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError("tokens and their types do not fit together, or a token comes twice")
    ids = [v for k, v in fields.items() if k.endswith("_token_id")]
    if not all(isinstance(i, int) and 0 <= i < len(tokens) for i in ids):
        raise ValueError("a special token's id is none of the vocabulary's")
    sentencepiece = fields["model"] == "llama"
    whole = {t for t, kind in zip(tokens, kinds, strict=True) if kind in (_UNKNOWN, _CONTROL, _USER)}
    backend = pieces(fields, whole) if sentencepiece else _byte_level(fields, pre)
    for of, special in (((_CONTROL, _UNKNOWN) if sentencepiece else (_CONTROL,), True), ((_USER,), False)):
        added = [
            AddedToken(t, normalized=False, special=special) for t, k in zip(tokens, kinds, strict=True) if k in of
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    if backend.get_vocab_size() != len(tokens):
        raise ValueError("adding the control tokens changes the vocabulary")
    before, behind = (
        fields.get("add_bos_token", sentencepiece or pre == "llama-bpe"),
        fields.get("add_eos_token", False),
    )
    around = [("bos", before), ("eos", behind)]
    used = [(tokens[i], i) for name, on in around if on and (i := fields.get(f"{name}_token_id")) is not None]
    if used:
        template = " ".join(
            [tokens[fields["bos_token_id"]]] * bool(before) + ["$A"] + [tokens[fields["eos_token_id"]]] * bool(behind)
        )
        backend.post_processor = TemplateProcessing(single=template, special_tokens=used)
    return backend


def _byte_level(fields: dict[str, Any], pre: str) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    vocabulary = {token: i for i, token in enumerate(fields["tokens"])}
    # Llama 3's splits take a word that is a token whole, whatever its merges.
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = splitting_of(pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def splitting_of(pre: str) -> Any:
    """The pre-tokenizer that llama.cpp calls `pre`."""
    pattern = SPLITS[pre]
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]) if pre == "smollm" else plain
