"""llama.cpp's own C interface, which the package xllamacpp carries: logits of every position of a text.

Structures of llama.h change between versions, so their defaults are looked at first, and an unknown layout is refused.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32


class _Parameters(ctypes.Structure):
    """llama_context_params or llama_model_params, larger than either; passed last, so that the rest is not read."""

    _fields_ = (("words", ctypes.c_uint32 * 64),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", _INT), ("token", _POINTER), ("embd", _POINTER), ("pos", _POINTER), ("n_seq_id", _POINTER),
        ("seq_id", _POINTER), ("logits", _POINTER),
    )  # fmt: skip


_CONTEXT, _BATCH, _MICRO, _FLASH, _KEYS, _VALUES = 0, 1, 2, 13, 26, 27
_DEFAULTS = {_CONTEXT: 512, _BATCH: 2048, _MICRO: 512, 3: 1, _FLASH: 2**32 - 1, 12: 2**32 - 1, _KEYS: 1, _VALUES: 1}


def _library() -> ctypes.CDLL:
    import xllamacpp

    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    library.llama_model_default_params.restype = library.llama_context_default_params.restype = _Parameters
    for name, arguments, result in (
        ("llama_model_load_from_file", [ctypes.c_char_p, _Parameters], _POINTER),
        ("llama_init_from_model", [_POINTER, _Parameters], _POINTER),
        ("llama_adapter_lora_init", [_POINTER, ctypes.c_char_p], _POINTER),
        ("llama_set_adapters_lora", [_POINTER, _POINTER, ctypes.c_size_t, _POINTER], _INT),
        ("llama_set_n_threads", [_POINTER, _INT, _INT], None),
        ("llama_get_memory", [_POINTER], _POINTER),
        ("llama_memory_clear", [_POINTER, ctypes.c_bool], None),
        ("llama_batch_init", [_INT, _INT, _INT], _Batch),
        ("llama_batch_free", [_Batch], None),
        ("llama_decode", [_POINTER, _Batch], _INT),
        ("llama_get_logits", [_POINTER], _POINTER),
        ("llama_model_get_vocab", [_POINTER], _POINTER),
        ("llama_vocab_n_tokens", [_POINTER], _INT),
        ("llama_free", [_POINTER], None),
        ("llama_model_free", [_POINTER], None),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    found = library.llama_context_default_params().words
    if wrong := {place: found[place] for place, value in _DEFAULTS.items() if found[place] != value}:
        raise RuntimeError(f"this xllamacpp has another llama.h than bench/packed/llama.py knows: {wrong}")
    return library


class Llama:
    """A GGUF model in llama.cpp, with float32 keys and values and no flash attention; close it after use."""

    def __init__(self, path: Path, adapter: Path | None = None, *, context: int = 512, threads: int = 1) -> None:
        self._library = library = _library()
        silent = ctypes.CFUNCTYPE(None, _INT, ctypes.c_char_p, _POINTER)
        self._silent = silent(lambda level, text, data: None)  # kept as long as it may be called
        library.llama_log_set(self._silent, None)
        self._model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not read {path}")
        parameters = library.llama_context_default_params()
        for place, value in ((_CONTEXT, context), (_BATCH, context), (_MICRO, context), (_FLASH, 0), (_KEYS, 0),
                             (_VALUES, 0)):  # fmt: skip
            parameters.words[place] = value
        self._context = library.llama_init_from_model(self._model, parameters)
        library.llama_set_n_threads(self._context, threads, threads)
        self.vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        self._adapter = adapter and library.llama_adapter_lora_init(self._model, str(adapter).encode())
        if adapter and not self._adapter:
            raise RuntimeError(f"llama.cpp does not read {adapter}")
        self.use(1.0)

    def use(self, scale: float) -> None:
        """The adapter at this scale."""
        if self._adapter:
            adapters, scales = (_POINTER * 1)(self._adapter), (ctypes.c_float * 1)(scale)
            assert self._library.llama_set_adapters_lora(self._context, adapters, 1, scales) == 0

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Of every position, (T, V) float32."""
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        batch = library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        tokens, places, counts = (
            ctypes.cast(p, ctypes.POINTER(_INT)) for p in (batch.token, batch.pos, batch.n_seq_id)
        )
        rows = ctypes.cast(batch.seq_id, ctypes.POINTER(ctypes.POINTER(_INT)))
        wanted = ctypes.cast(batch.logits, ctypes.POINTER(ctypes.c_int8))
        for place, token in enumerate(ids):
            tokens[place], places[place], counts[place], rows[place][0], wanted[place] = token, place, 1, 0, 1
        assert library.llama_decode(self._context, batch) == 0
        pointer = ctypes.cast(library.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        size = len(ids) * self.vocabulary
        found = torch.frombuffer(bytearray(ctypes.string_at(pointer, 4 * size)), dtype=torch.float32)
        library.llama_batch_free(batch)
        return found.view(len(ids), self.vocabulary)

    def close(self) -> None:
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)
