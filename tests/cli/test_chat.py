"""The chat verb, end to end on the embedded model: what is piped in, what comes out, and what is refused."""

import builtins
import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from minitune import models
from minitune.__main__ import main
from minitune.cli import chat
from minitune.inference import stop_strings
from minitune.inference.generate import greedy
from minitune.interop.peft.layout import Base
from minitune.interop.peft.save import save_adapter
from minitune.io import paths
from minitune.lora import Lora
from minitune.models.families import llama
from minitune.programs.loading import ModelSource, load
from minitune.programs.state import LoadedModel
from minitune.text import tokenizer
from minitune.text.chat import encode_prompt, open_template
from minitune.types import Delta, Params

TURNS = ("two apples and a pear to Anna", "and one more")
N_NEW = 7


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(ModelSource(path="demo"), Path(), 0)


def said(loaded: LoadedModel, params: Params, *turns: str, system: str | None = None) -> list[str]:
    """The answers of a conversation, each by greedy decoding of all before it."""
    messages = [{"role": "system", "content": system}] if system else []
    answers = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        ids = encode_prompt(loaded.tokenizer, loaded.template, messages)
        row = greedy(loaded.model, params, [ids], max_new_tokens=N_NEW, stop_ids=loaded.stop_ids)[0]
        answers.append(loaded.tokenizer.decode(row, skip_special=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


@pytest.fixture
def talked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What a chat with the demo writes to stdout and stderr when these lines are piped in."""

    def run(*lines: str, options: tuple[str, ...] = (), folder: str = "demo") -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", folder, "--max-new-tokens", str(N_NEW), *options]) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


def test_a_conversation_remembers_its_turns_and_forgets_them_when_told(talked: Any, loaded: LoadedModel) -> None:
    answers = said(loaded, loaded.params, *TURNS)
    fresh = said(loaded, loaded.params, TURNS[1])
    assert fresh[0] != answers[1]
    out, err = talked(TURNS[0], "", f"  {TURNS[1]} ", "/reset", TURNS[1], "/exit", "never read")
    assert out == "".join(f"{answer}\n" for answer in [*answers, *fresh])
    assert err == "the conversation is forgotten\n"


def test_commands(talked: Any) -> None:
    out, err = talked("/help", "/rest")
    assert out == ""
    assert err == f"{chat.COMMANDS}\n/rest is no command: {chat.COMMANDS}\n"


def test_the_system_message_comes_first_and_outlives_a_reset(talked: Any, loaded: LoadedModel) -> None:
    expected = said(loaded, loaded.params, TURNS[0], system="Short.")
    assert expected != said(loaded, loaded.params, TURNS[0])
    out, _ = talked(TURNS[0], "/reset", TURNS[0], options=("--system", "Short."))
    assert out == 2 * f"{expected[0]}\n"


def test_draws_are_the_seeds(talked: Any) -> None:
    options = ("--temperature", "1.5", "--top-k", "50", "--top-p", "0.99", "--min-p", "0.001", "--repetition-penalty", "1.1")
    first = talked(*TURNS, options=options)
    assert talked(*TURNS, options=(*options, "--seed", "0")) == first
    assert talked(*TURNS, options=(*options, "--seed", "1")) != first


def test_options_reach_the_template(talked: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(paths.locate("demo"), tmp_path / "options")
    source = open_template(folder, tokenizer.open_tokenizer(folder)).source
    (folder / "chat_template.jinja").write_text("{% if short %}{{ 'Say less: ' }}{% endif %}" + source, encoding="utf-8")
    loaded = load(ModelSource(path=str(folder), chat_template_kwargs={"short": True}), Path(), 0)
    quiet = load(ModelSource(path=str(folder)), Path(), 0)
    answer = said(loaded, loaded.params, TURNS[0])
    assert answer != said(quiet, quiet.params, TURNS[0])
    lines = talked(TURNS[0], options=("--chat-template-kwargs", '{"short": true}'), folder=str(folder))
    assert lines[0] == f"{answer[0]}\n"


def test_an_answer_ends_at_every_end_token_of_generation_config(talked: Any, loaded: LoadedModel, tmp_path: Path) -> None:
    prompt = encode_prompt(loaded.tokenizer, loaded.template, [{"role": "user", "content": TURNS[0]}])
    free = greedy(loaded.model, loaded.params, [prompt], max_new_tokens=N_NEW, stop_ids=[])[0]
    folder = shutil.copytree(paths.locate("demo"), tmp_path / "ends")
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [6, 2, {free[3]}]}}', encoding="utf-8")
    assert load(ModelSource(path=str(folder)), Path(), 0).stop_ids == [*loaded.stop_ids, free[3]]
    wanted = loaded.tokenizer.decode(free[: free.index(free[3])], skip_special=True)
    assert talked(TURNS[0], folder=str(folder))[0] == f"{wanted}\n"


def test_an_adapter_is_applied_without_merging(talked: Any, loaded: LoadedModel, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    out, in_ = loaded.params[name].shape
    generator = torch.Generator().manual_seed(0)
    deltas = {name: Delta(torch.randn(4, in_, generator=generator), 0.1 * torch.randn(out, 4, generator=generator))}
    rule = Lora(rank=4, alpha=8.0, targets=(name,))
    save_adapter(tmp_path / "deltas", deltas, rule, base=Base("demo"), names=loaded.params)
    merged = said(loaded, rule.merge(loaded.params, deltas), TURNS[0])
    assert merged != said(loaded, loaded.params, TURNS[0])
    assert talked(TURNS[0], options=("--deltas", str(tmp_path / "deltas")))[0] == f"{merged[0]}\n"


def test_an_interrupt_stops_the_answer_and_not_the_chat(
    talked: Any, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces, turns = stop_strings.pieces, iter([0, None])

    def interrupted(*args: Any) -> Iterator[str]:
        after = next(turns)
        for n, piece in enumerate(pieces(*args)):
            yield piece
            if n == after:
                raise KeyboardInterrupt

    monkeypatch.setattr(chat, "pieces", interrupted)
    asked: list[Any] = []
    encode = encode_prompt
    monkeypatch.setattr(chat, "encode_prompt", lambda *args: asked.append(args[2]) or encode(*args))
    first, second = talked(*TURNS)[0].splitlines()
    whole = said(loaded, loaded.params, TURNS[0])[0]
    part = first.removesuffix(" ...")
    assert part != first
    assert 0 < len(part) < len(whole)
    assert whole.startswith(part)
    assert [message["content"] for message in asked[-1]] == [TURNS[0], part, TURNS[1]]
    assert second


def test_a_terminal_gets_a_prompt_and_an_interrupt_there_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter([KeyboardInterrupt, "/help", EOFError])
    prompts: list[str] = []

    def typing(prompt: str) -> str:
        prompts.append(prompt)
        word = next(typed)
        if isinstance(word, str):
            return word
        raise word

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", typing)
    assert main(["chat", "demo"]) == 0
    assert prompts == ["> "] * 3
    assert capsys.readouterr().err == f"{chat.COMMANDS}\n\n/exit or Ctrl-D ends\n{chat.COMMANDS}\n"


def test_bytes_that_are_no_text(talked: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert talked("a \udcff b")[0] == talked("a ? b")[0]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    assert main(["chat", "demo"]) == 2
    assert "the input is not UTF-8" in capsys.readouterr().err


def test_a_conversation_longer_than_the_model_takes_is_said(
    talked: Any, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = encode_prompt(loaded.tokenizer, loaded.template, [{"role": "user", "content": TURNS[0]}])
    config = msgspec.structs.replace(loaded.model.config, max_positions=len(ids) + 2)
    monkeypatch.setattr(chat, "load", lambda *_: loaded._replace(model=models.Model(llama.FAMILY, config)))
    out, err = talked(TURNS[0], TURNS[1], "/reset", TURNS[0])
    whole = said(loaded, loaded.params, TURNS[0])[0]
    first, second = out.splitlines()
    assert first == second
    assert whole.startswith(first)
    assert 0 < len(first) < len(whole)
    assert "tokens and the model takes" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "chat: the following arguments are required: FOLDER, expected options as in"),
        (["demo", "--tempreature", "1"], "chat: unrecognized arguments: --tempreature 1, expected options as in"),
        (["demo", "--top-k", "x"], "chat: argument --top-k: invalid int value: 'x', expected options as in"),
        (["demo", "--top-p", "2"], r"chat: --top-p is 2.0, expected `float` <= 1.0; correct the command"),
        (["demo", "--min-p", "0.1"], "chat: min_p is 0.1 at temperature 0, .*; correct the command"),
        (["demo", "--max-new-tokens", "0"], "chat: --max-new-tokens is 0, expected at least 1"),
        (
            ["demo", "--chat-template-kwargs", "[1]"],
            r"chat: --chat-template-kwargs is .* expected a JSON object; correct",
        ),
        (
            ["demo", "--chat-template-kwargs", '{"x": 1}'],
            "chat_template_kwargs has 'x', expected what .* asks for: nothing",
        ),
        (["missing"], "models: missing/config.json does not exist"),
        (["demo", "--deltas", "missing"], "peft: missing/adapter_config.json does not exist"),
    ],
)
def test_what_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=message):
        chat.chat(words)
    assert main(["chat", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--help"]) == 0
    assert "--repetition-penalty R" in capsys.readouterr().out
