"""Pretrain the bundled demo model: a small GPT-2 with its own byte-level BPE, from any text file.

    python tools/pretrain.py TEXT_FILE --output xfactor_peft/demo_model

The text holds one paragraph a line; sixteen paragraphs in a row make a document, which starts with
`<|endoftext|>`. Every fiftieth document is held out, for the perplexity on the model card.

Two choices give the frozen, tied head *headroom* (how far a LoRA adapter can raise a few chosen
tokens). ln_f fixes the norm of the last hidden state at about gamma*sqrt(D), and |S| near-orthogonal
embeddings of norm nu can then share a logit of at most c = nu*gamma*sqrt(D/|S|). So embeddings start
long (std 1/sqrt(D), so nu = 1) and neither they nor any gain or bias is ever decayed.

Optimiser: Muon (Jordan et al. 2024) on the matrices inside the blocks, Adam on everything else.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import click
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
PARAGRAPHS_PER_DOCUMENT = 16
HELD_OUT_EVERY = 50


def read_documents(path: Path) -> tuple[list[str], list[str]]:
    """Return (training, held-out) documents; raises click.ClickException on an empty file."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise click.ClickException(f"{path} holds no text")
    step = PARAGRAPHS_PER_DOCUMENT
    documents = ["\n".join(lines[i : i + step]) for i in range(0, len(lines), step)]
    held_out = documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or documents[-1:]
    train = [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    return train, held_out


def train_tokenizer(documents: list[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE whose last id is the one special token, as in GPT-2."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents, vocab_size=vocab_size - 1, show_progress=False)
    bpe.add_special_tokens([EOS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        unk_token=EOS,
        model_max_length=context,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Concatenate the documents' ids, each after one EOS; shape (N,), int64."""
    ids: list[int] = []
    for start in range(0, len(documents), 1024):
        for document in tokenizer.backend_tokenizer.encode_batch_fast(documents[start : start + 1024]):
            ids.append(tokenizer.eos_token_id)
            ids.extend(document.ids)
    return torch.tensor(ids)


def build_model(vocab_size: int, width: int, layers: int, context: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=context,
        n_embd=width,
        n_layer=layers,
        n_head=width // 64,
        activation_function="gelu_pytorch_tanh",  # gelu_new as one kernel; the saved config says gelu_new
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=vocab_size - 1,
        eos_token_id=vocab_size - 1,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    torch.nn.init.normal_(model.transformer.wte.weight, std=width**-0.5)
    return model


def build_optimizers(model: GPT2LMHeadModel, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    blocks = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    inside = {id(p) for p in blocks}
    others = [p for p in model.parameters() if id(p) not in inside]
    muon = torch.optim.Muon(blocks, lr=muon_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)]


def schedule(step: int, steps: int, warmup: int = 100) -> float:
    """Linear warm-up, then linear decay to 2 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.02, (steps - step) / max(1, steps - warmup))


def batches(ids: torch.Tensor, batch: int, context: int, generator: torch.Generator):
    """Endless (batch, context) windows; each epoch starts at a new offset, in a new order."""
    while True:
        offset = int(torch.randint(context, (1,), generator=generator))
        windows = ids[offset : offset + (len(ids) - offset) // context * context].view(-1, context)
        order = torch.randperm(len(windows), generator=generator)
        for i in range(0, len(order) - batch + 1, batch):
            yield windows[order[i : i + batch]]


def token_losses(model: GPT2LMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, ids: torch.Tensor, context: int) -> float:
    """Mean loss per token, nats, over non-overlapping windows in fp32."""
    windows = ids[: len(ids) // context * context].view(-1, context)
    losses = [token_losses(model, w) * len(w) for w in windows.split(16)]
    return float(sum(losses) / len(windows))


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write float16 weights under a config that asks for float32 (half the file, no half-precision maths)."""
    output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(output)
    model.float()
    path = output / "config.json"
    config = json.loads(path.read_text())
    config.update(dtype="float32", activation_function="gelu_new", use_cache=True)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(output)


@click.command()
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--vocab-size", default=5120, show_default=True)
@click.option("--width", default=320, show_default=True, help="A multiple of 64.")
@click.option("--layers", default=4, show_default=True)
@click.option("--context", default=256, show_default=True)
@click.option("--batch", default=32, show_default=True)
@click.option("--epochs", default=2.0, show_default=True)
@click.option("--muon-lr", default=4e-3, show_default=True)
@click.option("--adam-lr", default=2e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Fuse with torch.compile; needs a C++ compiler.")
@click.option("--max-steps", type=int, help="Stop early (for a trial); the schedule is not shortened.")
def main(
    text,
    output,
    vocab_size,
    width,
    layers,
    context,
    batch,
    epochs,
    muon_lr,
    adam_lr,
    seed,
    compiled,
    max_steps,
):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train_documents, held_documents = read_documents(text)
    tokenizer = train_tokenizer(train_documents, vocab_size, context)
    train_ids, held_ids = encode(tokenizer, train_documents), encode(tokenizer, held_documents)
    model = build_model(len(tokenizer), width, layers, context).to(device)
    optimizers = build_optimizers(model, muon_lr, adam_lr)
    steps = math.ceil(epochs * len(train_ids) / (batch * context))
    data = batches(train_ids, batch, context, torch.Generator().manual_seed(seed))
    peaks = [group["lr"] for o in optimizers for group in o.param_groups]
    losses = torch.compile(token_losses) if compiled else token_losses
    click.echo(f"{model.num_parameters():,} parameters, {len(train_ids):,} training tokens, {steps} steps on {device}")
    started = time.time()
    for step in range(min(steps, max_steps or steps)):
        for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks, strict=True):
            group["lr"] = peak * schedule(step, steps)
        with torch.autocast(device, torch.bfloat16):
            loss = losses(model, next(data).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == steps - 1:
            rate = (step + 1) * batch * context / (time.time() - started)
            gain = float(model.transformer.ln_f.weight.detach().mean())
            norm = float(model.transformer.wte.weight.detach().norm(dim=1).mean())
            click.echo(f"step {step} loss {loss.item():.4f} tokens/s {rate:.0f} ln_f {gain:.2f} |wte| {norm:.2f}")
        if step % 500 == 499:
            save(model, tokenizer, output)
    model.eval().to("cpu")
    nats = held_out_loss(model, held_ids, context)
    save(model, tokenizer, output)
    record = dict(
        held_out_loss=nats,
        held_out_perplexity=math.exp(nats),
        held_out_tokens=len(held_ids),
        training_tokens=len(train_ids),
        steps=steps,
        epochs=epochs,
        batch=batch,
        seed=seed,
        muon_lr=muon_lr,
        adam_lr=adam_lr,
        seconds=round(time.time() - started),
    )
    (output / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
    click.echo(json.dumps(record))


if __name__ == "__main__":
    main()
