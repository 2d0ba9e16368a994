"""Prompts through a chat template: where there is one, and said so; R over the answer alone."""

import pytest

from xfactor_peft.cli.console import NOTHING
from xfactor_peft.errors import XFactorError
from xfactor_peft.options import ChatOptions, SamplingOptions
from xfactor_peft.sampling.generation import encode_prompt, generate, generate_batch, stream

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
OPTIONS = SamplingOptions(max_new_tokens=12, seed=4)


@pytest.fixture
def chatty(tiny):
    tiny.tokenizer.chat_template = TEMPLATE
    return tiny


def prompt_of(base, chat):
    return base.tokenizer.decode(encode_prompt(base.tokenizer, base.model, "The fox", 12, chat))


def test_a_prompt_is_put_into_roles(chatty):
    assert prompt_of(chatty, ChatOptions("auto")) == prompt_of(chatty, ChatOptions("on")) == "<user>The fox;<a>"
    assert prompt_of(chatty, ChatOptions("on", "Be short")) == "<system>Be short;<user>The fox;<a>"
    assert prompt_of(chatty, ChatOptions("off")) == prompt_of(chatty, ChatOptions()) == "The fox"


def test_without_a_template(tiny):
    assert prompt_of(tiny, ChatOptions("auto")) == "The fox"
    with pytest.raises(XFactorError, match="`chat=on` needs a tokenizer with a chat template"):
        prompt_of(tiny, ChatOptions("on"))
    with pytest.raises(XFactorError, match="`system` needs a tokenizer with a chat template"):
        prompt_of(tiny, ChatOptions("auto", "Be short"))
    with pytest.raises(XFactorError, match="`chat` must be one of"):
        ChatOptions("maybe")
    with pytest.raises(XFactorError, match="`system` is a chat's"):
        ChatOptions("off", "Be short")


def test_a_template_that_refuses_is_one_error(chatty):
    chatty.tokenizer.chat_template = NO_SYSTEM
    assert prompt_of(chatty, ChatOptions("on")) == "<user>The fox;<a>"
    with pytest.raises(XFactorError, match="chat template refuses: no system"):
        prompt_of(chatty, ChatOptions("on", "Be short"))


def test_every_way_of_generating_takes_it(chatty):
    """The answer is what follows the template's text as a plain prompt."""
    model, tokenizer, chat = chatty.model, chatty.tokenizer, ChatOptions("on")
    expected = generate(model, tokenizer, "<user>The fox;<a>", OPTIONS)
    assert generate(model, tokenizer, "The fox", OPTIONS, chat) == expected
    assert list(stream(model, tokenizer, "The fox", OPTIONS, chat=chat))[-1] == expected
    assert generate_batch(model, tokenizer, ["The fox"], OPTIONS, chat) == [expected]
    assert generate(model, tokenizer, "The fox", OPTIONS) != expected


@pytest.fixture
def chat_folder(tiny_folders, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_folders["gpt2"], tmp_path / "chatty")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def shown(output):
    """What is printed below the base's name: its text, and R."""
    return output.split("\nbase\n")[1].strip().splitlines()


def test_the_command_line_says_which(run, chat_folder, tiny_folders):
    few = ("The fox", "--max-new-tokens", 12, "--seed", 4)
    chat = run("generate", "--model", chat_folder, *few).output
    assert chat.splitlines()[0].endswith("; prompts go through its chat template")
    on = run("generate", "--model", chat_folder, "--chat", "on", *few).output
    assert shown(on) == shown(chat)
    off = run("generate", "--model", chat_folder, "--chat", "off", *few).output
    assert off.splitlines()[0].endswith("; its chat template is off")
    plain = run("generate", "--model", tiny_folders["gpt2"], *few).output
    assert plain.splitlines()[0].endswith("; prompts are plain text")
    assert shown(off) == shown(plain) != shown(chat)
    system = run("generate", "--model", chat_folder, "--system", "Be short", *few).output
    assert shown(system) != shown(chat)
    assert "of 12 tokens" in system  # of the answer alone
    played = run("play", "--model", chat_folder, "--max-new-tokens", 12, "--seed", 4, input="The fox\n").output
    assert played.splitlines()[0].endswith("; prompts go through its chat template")
    refused = run("generate", "--model", tiny_folders["gpt2"], "--chat", "on", *few, code=2).output
    assert "Error: --chat on needs a tokenizer with a chat template" in refused
    refused = run("generate", "--model", chat_folder, "--chat", "off", "--system", "Be short", *few, code=2).output
    assert "Error: --system is a chat's; pass --chat on with it" in refused


def test_an_answer_of_no_tokens_is_said_to_be_one(run, chat_folder):
    """In place of an empty box."""
    import json

    path = chat_folder / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"eos_token_id": list(range(384))}))
    few = ("--model", chat_folder, "--max-new-tokens", 4)
    assert shown(run("generate", *few, "The fox").output)[0] == NOTHING
    assert NOTHING in run("play", *few, input="The fox\n").output
    path.write_text(json.dumps(settings))
    assert NOTHING not in run("generate", *few, "The fox").output


def test_the_checkpoint_s_settings_are_named_and_not_used(run, chat_folder):
    import json

    few = ("generate", "--model", chat_folder, "The fox", "--max-new-tokens", 12)
    before = run(*few).output
    assert "not used" not in before
    path = chat_folder / "generation_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.5, "min_p": 0.2, "num_beams": 2})
    )
    after = run(*few).output
    line = " ".join(after.split())
    assert "not used: the checkpoint's own decoding settings, " in line
    assert all(setting in line for setting in ("repetition_penalty 1.5", "min_p 0.2", "num_beams 2"))
    assert shown(after) == shown(before)


def test_play_remembers_a_chat_until_it_is_told_to_forget(load_tiny, chat_folder, tmp_path):
    from xfactor_peft.bank.bank import AdapterBank
    from xfactor_peft.base.loading import load_base
    from xfactor_peft.base.resolve import resolve_model
    from xfactor_peft.cli.play import Session
    from xfactor_peft.options import ChatOptions, LoadOptions, SamplingOptions

    base = load_base(resolve_model(str(chat_folder)), LoadOptions("fp32"))
    session = Session(AdapterBank(base, tmp_path), SamplingOptions(max_new_tokens=6, seed=1), ChatOptions("auto"))
    first, second = (list(session.stream(text))[-1] for text in ("The fox", "The fox"))
    assert first != second  # the same words, after a turn
    question, answer, *_ = session.chat.earlier
    assert (question, answer) == ("The fox", base.tokenizer.decode(first, skip_special_tokens=True))
    assert len(session.chat.earlier) == 4
    for _ in range(12):  # the context of 128 is full long before
        list(session.stream("The fox"))
    assert 2 <= len(session.chat.earlier) < 28
    assert session.answer("/new") == "a new conversation"
    assert list(session.stream("The fox"))[-1] == first
    plain = Session(AdapterBank(load_tiny(), tmp_path), SamplingOptions(max_new_tokens=6, seed=1))
    assert list(plain.stream("The fox"))[-1] == list(plain.stream("The fox"))[-1]
    assert plain.chat.earlier == ()
