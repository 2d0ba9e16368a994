"""A folder that `ollama create` takes: the adapter as a GGUF file, and a Modelfile that names it and its base."""

from __future__ import annotations

from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..adapters.files import RECORD, write_json
from ..adapters.mix import Mix
from ..adapters.output import staged
from ..bank.bank import AdapterBank
from ..errors import XFactorError
from ..tokens.ends import end_ids
from .gguf_lora import write_lora

_SYSTEM, _USER, _ANSWER, _NEXT = "<<system>>", "<<user>>", "<<answer>>", "<<next>>"


def write_ollama(bank: AdapterBank, mix: Mix, output: Path, *, force: bool) -> str:
    """OUTPUT/Modelfile (FROM, ADAPTER, TEMPLATE, stops) and OUTPUT/adapter.gguf; the base stays where it is.

    Raises:
        XFactorError: the base is no GGUF file, `output` holds something else, or as `write_lora`.
    """
    file, base = bank.base.choice.gguf, bank.base
    if file is None:
        raise XFactorError(
            f"a Modelfile names a GGUF file, and {base.choice.name} is none; give the GGUF file of the same model as "
            "`model`"
        )
    template = go_template(base.tokenizer)
    lines = [f"FROM {file.resolve()}", "ADAPTER ./adapter.gguf"]
    if template is not None:
        text, system = template
        lines += [f'TEMPLATE """{text}"""'] + [f'SYSTEM """{system}"""'] * bool(system)
    stops = [base.tokenizer.convert_ids_to_tokens(i) for i in end_ids(base.tokenizer, base.model)]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    with staged(output, force=force) as staging:
        write_lora(bank, mix, staging / "adapter.gguf")
        (staging / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_json(staging / RECORD, {"format": 1, "kind": "ollama", "merged_from": [], "base": base.record()})
    left = "" if template else "; its chat template cannot be said in Ollama's way, so that Ollama guesses it"
    return f"{output}: `ollama create NAME -f {output}/Modelfile` runs {mix}{left}"


def go_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """(Ollama's TEMPLATE, the system's message where none is given), or None where the two ways do not agree.

    A turn in Ollama is: perhaps the system's message, the prompt, the answer, each with text around it. That text is
    read off a conversation that the tokenizer's own template has written, and two others are compared with it. Ollama
    puts BOS before a text itself.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return "{{ .Prompt }}", ""

    bos = getattr(tokenizer, "bos_token", None)
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]

    def written(*texts: str, asks: bool = True, system: bool = True) -> str:
        roles = (["system"] if system else []) + ["user", "assistant"] * len(texts)
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))
        return whole.removeprefix(str(bos)) if adds_bos else whole

    try:
        long, done = written(_SYSTEM, _USER, _ANSWER, _NEXT), written(_SYSTEM, _USER, _ANSWER, asks=False)
        plain, without = written(_SYSTEM, _USER), written(_USER, system=False)
        head, rest = long.split(_SYSTEM)
        between, rest = rest.split(_USER)
        before_answer, rest = rest.split(_ANSWER)
        gap, after = rest.split(_NEXT)
        behind = done.split(_ANSWER)[1]
    except (TemplateError, ValueError, TypeError, IndexError):
        return None
    ask = gap.removeprefix(behind)
    close = between.removesuffix(ask)
    turn = f"{ask}{_USER}{before_answer}"
    told = without.removesuffix(turn)
    system = told.removeprefix(head).removesuffix(close)
    agree = (
        gap == behind + ask
        and between == close + ask
        and after == before_answer
        and plain == f"{head}{_SYSTEM}{close}{turn}"
        and without == told + turn
        and told in ("", f"{head}{system}{close}")
    )
    if not agree or any(mark in long + system for mark in ("{{", '"""')):
        return None
    said = f"{{{{ if .System }}}}{head}{{{{ .System }}}}{close}{{{{ end }}}}"
    asked = f"{{{{ if .Prompt }}}}{ask}{{{{ .Prompt }}}}{before_answer}{{{{ end }}}}"
    return f"{said}{asked}{{{{ .Response }}}}{behind}", system if told else ""
