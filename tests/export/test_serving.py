"""`xfactor serve`: llama.cpp on a GGUF base with adapters, a scale in every request."""

import json
import urllib.request

import pytest
import torch

from tests.bank.loaded import bank_of
from tests.tiny import tiny_model_folder
from xfactor_peft.adapters.mix import Mix
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.cli import serve
from xfactor_peft.export import export
from xfactor_peft.objective.targets import UniformTarget
from xfactor_peft.options import EvalOptions, LoadOptions, LoraOptions, Recipe, SamplingOptions, TrainOptions
from xfactor_peft.runs.run import train_to_folder
from xfactor_peft.tokens.token_set import TokenSet

pytest.importorskip("gguf", reason="the extra gguf is not installed")
pytest.importorskip("xllamacpp", reason="the extra serve is not installed")
PROMPT = [40, 80, 120, 90, 33, 250]
BRIEF = EvalOptions(("The fox",), 1, SamplingOptions(max_new_tokens=4))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with a tiny Llama as model.gguf and an adapter of it, adapters/x, that holds a dial."""
    root = tmp_path_factory.mktemp("served")
    tiny_model_folder("llama", root / "model")
    export(bank_of(load_base(resolve_model(str(root / "model")), LoadOptions("fp32")), root), Mix(), "gguf",
           root / "model.gguf")  # fmt: skip
    base = load_base(resolve_model(str(root / "model.gguf")), LoadOptions("fp32"))
    target = UniformTarget(TokenSet.contains(base.tokenizer, "X"))
    recipe = Recipe(TrainOptions(steps=8, seq_len=16, lr=3e-2), LoraOptions(r=2), BRIEF)
    train_to_folder(base, target, root / "adapters" / "x", recipe)
    record = root / "adapters" / "x" / "xfactor.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "rate": {"dial": [[0.5, 0.0321], [1.0, 0.0987]]}}))
    return root


def asked(address, path, **request):
    call = urllib.request.Request(f"{address}/{path}", json.dumps(request).encode())
    call.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(call, timeout=60) as answer:
        return json.load(answer)


def log_probs(address, **scales):
    request = {"prompt": PROMPT, "n_predict": 1, "n_probs": 384, "temperature": 0, **scales}
    found = torch.full((384,), float("nan"))
    for candidate in asked(address, "completion", **request)["completion_probabilities"][0]["top_logprobs"]:
        found[candidate["id"]] = candidate["logprob"]
    return found


def test_every_request_has_its_own_scale(served, run, monkeypatch):
    """Whatever came before: off, on, off again without a word of scales, half."""
    bank = bank_of(load_base(resolve_model(str(served / "model.gguf")), LoadOptions("fp32")), served / "adapters", "x")
    seen = {}

    class Meanwhile:
        def wait(self):
            address = seen["address"]
            scales = {"off": {}, "on": 1.0, "off again": {}, "half": 0.5}
            for name, scale in scales.items():
                lora = {"lora": [{"id": 0, "scale": scale}]} if scale else {}
                seen[name] = log_probs(address, **lora)
            seen["answer"] = asked(address, "v1/completions", prompt="The fox", max_tokens=3)
            raise KeyboardInterrupt

    def said(line):
        seen.setdefault("lines", []).append(line)
        if line.endswith("Ctrl-C ends it"):
            seen["address"] = line.partition("/v1")[0]

    monkeypatch.setattr(serve.threading, "Event", Meanwhile)
    monkeypatch.setattr(serve, "say", said)
    run("serve", "x", "--adapters-dir", served / "adapters", "--port", "0", "--threads", "1", "--context", "64")
    with torch.no_grad():
        for scale, names in ((0.0, ("off", "off again")), (0.5, ("half",)), (1.0, ("on",))):
            bank.use("x", scale)
            wanted = bank.model(input_ids=torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
            for name in names:
                torch.testing.assert_close(seen[name], wanted, atol=0.1, rtol=0)  # its cache is float16
    assert (seen["on"] - seen["off"]).abs().max() > 1
    assert seen["answer"]["choices"][0]["text"] is not None
    assert seen["address"].startswith("http://127.0.0.1:")
    text = "\n".join(seen["lines"])
    assert '"lora": [{"id": 0, "scale": 1.0}]' in text
    assert "R  0.0321   at scale 0.50" in text
    assert "R  0.0987   at scale 1.00" in text


def test_what_cannot_be_served_is_refused_with_the_way_round(served, run, adapters_root):
    line = run("serve", "x", "--adapters-dir", adapters_root, code=2).output
    assert "llama.cpp runs GGUF files" in line
    assert "export the adapter as gguf" in line
    line = run("serve", "x", "--adapters-dir", served / "adapters", "--port", "1", "--host", "192.0.2.1", code=2).output
    assert "is the port free?" in line
