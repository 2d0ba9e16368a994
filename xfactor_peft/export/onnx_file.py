"""The merged model as ONNX, through torch's own exporter."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..adapters.mix import Mix
from ..bank.bank import AdapterBank
from ..bank.merging import merge
from ..errors import XFactorError, first_line
from .optional import need


class _Logits(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def data_of(output: Path) -> Path:
    """Where torch writes weights that are too large for the file itself."""
    return output.with_name(f"{output.name}.data")


def write_onnx(bank: AdapterBank, mix: Mix, output: Path) -> str:
    """input_ids (batch, time) int64 -> logits (batch, time, V) float32; both axes are dynamic, without a KV cache.

    Large weights lie beside the file, in a file of the same name with ".data".

    Raises:
        XFactorError: onnx or onnxscript is missing, the adapter cannot be merged, or torch cannot export the model.
    """
    need("onnx", "onnx")
    need("onnxscript", "onnx")
    notes: list[str] = []
    model = merge(bank, mix, tell=notes.append).eval()
    ids = torch.arange(18, device=bank.base.device).remainder(bank.base.vocab_size).view(2, 9)
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            program = torch.onnx.export(
                _Logits(model), (ids,), dynamo=True, verbose=False, input_names=["input_ids"], output_names=["logits"],
                dynamic_shapes={"input_ids": shape},
            )  # fmt: skip
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        raise XFactorError(f"torch cannot export {type(model).__name__}: {first_line(error)}") from error
    assert program is not None  # which it would be without dynamo
    program.save(output)
    shapes = f"input_ids (batch, time) -> logits (batch, time, {bank.base.vocab_size})"
    return "; ".join([f"merged {mix} into {output}: {shapes}", *notes])
