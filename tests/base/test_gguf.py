"""GGUF files as bases: every number format, every family's layout, what is refused, training, and llama.cpp's view."""

import struct
import warnings

import pytest
import torch

from tests.bank.loaded import bank_of
from tests.tiny import tiny_model_folder
from xfactor_peft.adapters.mix import Mix
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.base.split_model import split
from xfactor_peft.errors import XFactorError, XFactorWarning
from xfactor_peft.export import export
from xfactor_peft.lowmem.gguf_file import read_gguf
from xfactor_peft.lowmem.gguf_formats import BY_NAME
from xfactor_peft.lowmem.gguf_layers import GgufLinear, PackedMatrix
from xfactor_peft.objective.targets import UniformTarget
from xfactor_peft.options import EvalOptions, LoadOptions, LoraOptions, Recipe, SamplingOptions, TrainOptions
from xfactor_peft.runs.run import train_to_folder
from xfactor_peft.tokens.token_set import TokenSet

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
TEXT = "The fox and Xavier mixed 12 boxes, isn't it?\n XX"


def random_bytes(form, rows, columns, seed=0):
    """Packed rows whose scales are ordinary numbers and whose codes are anything."""
    generator = torch.Generator().manual_seed(seed)
    if form.plain is not None:
        values = torch.randn(rows, columns, generator=generator).to(form.plain)
        return values.view(torch.uint8).view(rows, -1)
    blocks = torch.randint(0, 256, (rows * columns // form.weights, form.size), generator=generator, dtype=torch.uint8)
    for start in {"Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,), "Q6_K": (208,)}.get(form.name, (0, 2)):
        blocks[:, start : start + 2] = torch.randn(len(blocks), 1, generator=generator).half().view(torch.uint8)
    return blocks.view(rows, -1)


def expected(form, packed):
    kind = gguf.GGMLQuantizationType[form.name]
    return torch.from_numpy(gguf.quants.dequantize(packed.numpy(), kind).copy()).float()


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize(("rows", "blocks", "pairs"), [(1, 1, None), (7, 3, None), (24, 5, 3), (13, 1, None)])
def test_products_are_those_of_the_unpacked_weight(name, rows, blocks, pairs, monkeypatch):
    """Unpacked as gguf's own code does it, in pieces of a few rows; products in float64 leave rounding out."""
    form = BY_NAME[name]
    columns = blocks * max(form.weights, 32)
    packed = random_bytes(form, rows, columns)
    want = expected(form, packed)
    monkeypatch.setattr("xfactor_peft.lowmem.gguf_layers.PIECE", 4 * columns)
    monkeypatch.setattr("xfactor_peft.lowmem.gguf_formats.PIECE", 2 * columns)
    if pairs:
        want = want.view(pairs, -1, 2, columns).transpose(1, 2).reshape(rows, columns)
    matrix = PackedMatrix(packed, form, columns, torch.float32, pairs)
    torch.testing.assert_close(matrix.unpacked(torch.float32), want, atol=1e-5, rtol=1e-6)
    assert torch.equal(matrix.unpacked(torch.bfloat16), matrix.unpacked(torch.float32).bfloat16())
    layer, wide = GgufLinear(matrix), want.double()
    x = torch.randn(5, columns, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, x @ wide.T, atol=1e-4, rtol=1e-5)
    g = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], g @ wide, atol=1e-4, rtol=1e-5)
    addend = torch.randn(5, rows, dtype=torch.float64)
    torch.testing.assert_close(
        matrix.product(x.detach(), addend.clone()), addend + x.detach() @ wide.T, atol=1e-4, rtol=1e-5
    )
    if not pairs:
        ids = torch.tensor([rows - 1, 0])
        torch.testing.assert_close(matrix.rows(ids), want[ids], atol=1e-5, rtol=1e-6)


def rewritten(source, target, kinds=lambda name: None, fields=None, leave_out=()):
    """A copy of a GGUF file with matrices in other formats and fields changed."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    changed = dict(fields or {})
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or (name in changed and changed[name] is None):
            continue
        value = changed.pop(name) if name in changed else field.contents()
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, value, field.types[0], inner)
    for name, (value, kind) in ((n, v) for n, v in changed.items() if v is not None):
        writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        if tensor.name in leave_out:
            continue
        kind = kinds(tensor.name) if len(tensor.shape) > 1 else None
        if kind is None:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            packed = gguf.quants.quantize(tensor.data, gguf.GGMLQuantizationType[kind])
            writer.add_tensor(tensor.name, packed, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def source(request, tmp_path_factory):
    """A tiny model's folder and its GGUF file in float32."""
    root = tmp_path_factory.mktemp(request.param)
    folder = tiny_model_folder(request.param, root / "model")
    folder = root / "model"
    bank = bank_of(load_base(resolve_model(str(folder)), LoadOptions("fp32")), root)
    export(bank, Mix(), "gguf", root / "model.gguf")
    return folder, root / "model.gguf"


def load(path, dtype="fp32"):
    return load_base(resolve_model(str(path)), LoadOptions(dtype))


@torch.no_grad()
def test_the_file_is_the_model_it_was_made_from(source):
    folder, file = source
    plain, ours = load(folder), load(file)
    ids = plain.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert torch.equal(ours.tokenizer(TEXT, return_tensors="pt")["input_ids"], ids)
    assert ours.tokenizer.decode(ids[0]) == TEXT
    wanted = plain.model(input_ids=ids).logits
    torch.testing.assert_close(ours.model(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-4)
    parts = split(ours.model)
    torch.testing.assert_close(parts.logits(parts.hidden(ids)), wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16"])
def test_a_quantised_file_is_the_model_with_its_unpacked_weights(source, kind, tmp_path):
    folder, file = source
    quantised = rewritten(file, tmp_path / f"{kind}.gguf", lambda name: None if "position" in name else kind)
    unpacked = rewritten(file, tmp_path / "f32.gguf")
    with unpacked.open("r+b") as out:  # the same values as float32, in place
        places = {t.name: t for t in gguf.GGUFReader(unpacked).tensors}
        for tensor in gguf.GGUFReader(quantised).tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            out.seek(int(places[tensor.name].data_offset))
            out.write(values.astype("float32").tobytes())
    ids = torch.arange(20)[None]
    wanted, got = load(unpacked).model(input_ids=ids).logits, load(quantised).model(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    if kind.startswith("Q"):  # and not the weights from before
        assert (got - load(folder).model(input_ids=ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "leave_out", "message"),
    [
        ({"llama.attention.sliding_window": (7, 4)}, (), "attention.sliding_window"),
        ({"llama.rope.scaling.type": ("yarn", 8)}, (), "rope.scaling.type"),
        ({"tokenizer.ggml.pre": "jina-v1-en"}, (), "jina-v1-en"),
        ({"tokenizer.ggml.remove_extra_whitespaces": (True, 7)}, (), "remove_extra_whitespaces"),
        ({"llama.block_count": None}, (), "block_count is missing"),
        ({"llama.block_count": 3}, (), "llama.block_count does not fit its tensors"),
        ({"llama.block_count": 2**20}, (), "llama.block_count does not fit its tensors"),
        ({"llama.embedding_length": 32}, (), "llama.embedding_length does not fit its tensors"),
        ({"llama.feed_forward_length": 2**22}, (), "llama.feed_forward_length does not fit its tensors"),
        ({"llama.rope.freq_base": 1e-44}, (), "freq_base is .* below 1"),
        ({}, ("blk.1.ffn_up.weight",), "mlp.up_proj.weight is missing"),
        ({"general.architecture": "mamba"}, (), "GGUF files are read of"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(source, fields, leave_out, message, tmp_path):
    folder, file = source
    if "gpt2" in str(folder):
        pytest.skip("llama's fields")
    typed = {k: (v[0], gguf.GGUFValueType(v[1])) if isinstance(v, tuple) else v for k, v in fields.items()}
    if "general.architecture" in fields:
        path = tmp_path / "x.gguf"
        path.write_bytes(file.read_bytes().replace(b"llama", b"mamba"))
    else:
        path = rewritten(file, tmp_path / "x.gguf", fields=typed, leave_out=leave_out)
    with pytest.raises(XFactorError, match=message):
        load(path)


def test_quantising_again_and_full_fine_tuning_are_refused(source):
    choice = resolve_model(str(source[1]))
    with pytest.raises(XFactorError, match=r"quantised already.*quantization=int8"):
        load_base(choice, LoadOptions("fp32", quantization="int8"))
    with pytest.raises(XFactorError, match="method=lora"):
        load_base(choice, LoadOptions("fp32", master_weights=True))


def refusal(path):
    try:
        load(path)
    except XFactorError as error:
        return str(error)
    return None


def test_damaged_files_end_in_one_line(source, tmp_path):
    """Cut off, and with bytes of the header changed: read as another whole model, or refused."""
    data = source[1].read_bytes()
    generator = torch.Generator().manual_seed(0)
    header = len(data) - sum(t.data.numel() for t in read_gguf(source[1]).tensors.values())
    path, refused = tmp_path / "x.gguf", 0
    for number in range(40):
        changed = bytearray(data)
        place = int(torch.randint(0, 400 if number % 2 else header, (1,), generator=generator))
        if number % 4 == 0:
            del changed[place:]
        elif number % 4 == 1:
            changed[place : place + 8] = struct.pack("<Q", 2**62 + number)
        else:
            changed[place] ^= 1 << number % 8
        path.write_bytes(changed)
        line = refusal(path)
        refused += line is not None
        assert line is None or "\n" not in line
    assert refused > 20


def adapter_of(path, root):
    """A small trained adapter, root/a, whose record names the base at `path`."""
    base = load(path)
    target = UniformTarget(TokenSet.contains(base.tokenizer, "X"))
    brief = EvalOptions(("The fox",), 1, SamplingOptions(max_new_tokens=4))
    train_to_folder(base, target, root / "a", Recipe(TrainOptions(steps=1, seq_len=8), LoraOptions(r=1), brief))


def test_another_quantisation_is_the_same_base_and_says_so(source, tmp_path, run):
    """The file under another name without a word, another quantisation with a line, another model not at all."""
    _, file = source
    first, second = (
        rewritten(file, tmp_path / f"{kind}.gguf", lambda name, kind=kind: None if "position" in name else kind)
        for kind in ("Q8_0", "Q4_0")
    )
    (tmp_path / "renamed.gguf").write_bytes(first.read_bytes())
    adapter_of(first, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bank_of(load(tmp_path / "renamed.gguf"), tmp_path, "a")
    with pytest.warns(XFactorWarning, match="another quantisation of this model"):
        bank_of(load(second), tmp_path, "a")
    words = ["generate", "--adapter", "a", "--adapters-dir", tmp_path, "--max-new-tokens", 2, "The fox"]
    shown = run(*words, "--model", second)
    assert "Note: adapter a was made for another quantisation" in shown.output
    assert "XFactorWarning" not in shown.output
    data = bytearray(file.read_bytes())  # other weights, the same vectors, fields and tokenizer
    tensor = next(t for t in gguf.GGUFReader(file).tensors if "ffn_up" in t.name)
    start = int(tensor.data_offset)
    data[start : start + tensor.n_bytes] = bytes(torch.randn(int(tensor.n_elements)).numpy().tobytes())
    (tmp_path / "other.gguf").write_bytes(data)
    with pytest.raises(XFactorError, match="different: weights"):
        bank_of(load(tmp_path / "other.gguf"), tmp_path, "a")
