"""The chat templates of published model folders, as TRL keeps them: text, ids, mask and options are those of transformers."""

import json
import re
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trl
from transformers import PreTrainedTokenizerFast

from minitune.data import preference
from minitune.data.prompts import prompts
from minitune.data.source import MixtureComponent, Source
from minitune.data.supervised import prepare
from minitune.errors import InputError
from minitune.text.chat import Tokens, encode_chat, encode_prompt, open_template
from minitune.text.served import encode_answer, stop_ids
from minitune.text.template import Message, Template, compile_template, render, with_options
from minitune.text.tokenizer import Tokenizer, open_tokenizer
from support.tokenizers import with_special_tokens, write_folder

FOLDER = Path(trl.__file__).parent / "chat_templates"
PUBLISHED = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
TEXT = [name for name in PUBLISHED if "llava" not in name]  # that one wants a list of parts
WANT_PARTS = ["idefics3_training", "smolvlm_training"]  # a string has nothing that they would write
MARKED = [name for name in TEXT if re.search(r"{%-? generation -?%}", PUBLISHED[name])]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
SPECIAL = re.compile(
    r"<\|[^<>|'\"\s{}]+\|?>|<[^<>|'\"\s{}]+\|>|<\uff5c[^<>'\"\s{}]+\uff5c>|<(?:start_of_turn|end_of_turn|end_of_utterance)>|\[/?INST\]"
)
FUNCTION = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"é<&>": {}}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"é<&>": ["x", 2]}}}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


TURNS = [user("two"), assistant("pear"), user("one"), assistant("apple")]
CONVERSATIONS: dict[str, tuple[list[Message], list[Any]]] = {
    "turns": (TURNS, []),
    "open": (TURNS[:3], []),
    "system": ([{"role": "system", "content": "Be  brief. "}, *TURNS], []),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "two"}]}], []),
    "tools": ([user("a"), assistant("", tool_calls=[CALL]), {"role": "tool", "name": "weather", "content": "9"}], [FUNCTION]),
    "reasoning": ([user("a"), assistant("b", reasoning_content="r"), user("c"), assistant("d", reasoning_content="s")], []),
    "thoughts": ([user("a"), assistant("<think>\nr\n</think>\n\nb"), user("c")], []),
}


@cache
def speaker() -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """minitune's and transformers' tokenizers of one folder that has the special tokens of all the templates."""
    special = sorted({token for text in PUBLISHED.values() for token in SPECIAL.findall(text)})
    return with_special_tokens(NAMES, [*NAMES.values(), *special])


@cache
def template(name: str) -> Template:
    return compile_template(PUBLISHED[name], NAMES, name)


def theirs(name: str, messages: Sequence[Message], tools: Sequence[Any], opened: bool, options: dict[str, Any]) -> str | None:
    """transformers' rendering; None where the template refuses the conversation."""
    try:
        return speaker()[1].apply_chat_template(
            messages, tools=tools or None, chat_template=PUBLISHED[name], tokenize=False, add_generation_prompt=opened, **options
        )
    except Exception:  # a template raises whatever it likes
        return None


def ours(chat_template: Template, messages: Sequence[Message], tools: Sequence[Any], opened: bool) -> str | None:
    try:
        return render(chat_template, messages, tools=tools, add_generation_prompt=opened)
    except InputError:
        return None


def spans(tokens: Tokens) -> list[str]:
    """The text of every run of trained tokens."""
    runs = [
        [i for i, _ in run]
        for trained, run in groupby(zip(tokens.ids, tokens.mask, strict=True), lambda pair: pair[1])
        if trained
    ]
    return [speaker()[0].decode(run, skip_special=False) for run in runs]


def test_there_are_templates_of_many_families() -> None:
    assert {"llama3", "llama3_1", "gemma3", "phi3_5", "qwen2_5", "qwen3", "gptoss", "cohere", "deepseekv3"} <= set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_rendering_equals_transformers_with_every_option(name: str) -> None:
    chat_template = template(name)
    given = [{}, *({option: value} for option in sorted(chat_template.variables) for value in (False, True, "high"))]
    for messages, tools in CONVERSATIONS.values():
        for opened in (False, True):
            for options in given:
                wanted = theirs(name, messages, tools, opened, options)
                assert ours(with_options(chat_template, options, "here"), messages, tools, opened) == wanted


ASKED = {
    "qwen3": {"enable_thinking"},
    "qwen3_6": {"add_vision_id", "content", "enable_thinking", "preserve_thinking"},  # content: set in one branch, tested in one
    "gptoss": {"builtin_tools", "model_identity", "reasoning_effort"},
    "llama3_1": {"builtin_tools", "custom_tools", "date_string", "tools_in_user_message"},
    "gemma4_v5": {"enable_thinking", "preserve_thinking"},
    "lfm2_2_5": {"preserve_thinking"},
    "llama3": set(),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_a_template_asks_for(name: str) -> None:
    assert template(name).variables == ASKED[name]


@pytest.mark.parametrize("name", MARKED)
def test_ids_and_mask_of_marked_templates_equal_transformers(name: str) -> None:
    for messages in (TURNS, TURNS[:2]):
        given: Sequence[Message] = messages
        if name in WANT_PARTS:
            given = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
        wanted = speaker()[1].apply_chat_template(
            given, chat_template=PUBLISHED[name], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        encoded = encode_chat(speaker()[0], template(name), messages)
        assert encoded.ids == wanted["input_ids"]
        assert encoded.mask == [bool(one) for one in wanted["assistant_masks"]]
        assert any(encoded.mask)


ENDS = {
    **dict.fromkeys(["llama3", "llama3_1", "llama3_2"], "<|eot_id|>"),
    **dict.fromkeys(["gemma", "gemma3"], "<end_of_turn>"),
    **dict.fromkeys(["phi3", "phi3_5"], "<|end|>"),
    **dict.fromkeys(["qwen2_5", "qwen3_instruct_2507", "qwen2_5_vl", "lfm2"], "<|im_end|>"),
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "gemma4_v5": "<turn|>",
}


@pytest.mark.parametrize("name", ENDS)
def test_the_spans_are_the_answers_with_the_token_that_ends_them(name: str) -> None:
    tokenizer = speaker()[0]
    assert spans(encode_chat(tokenizer, template(name), TURNS)) == [f"pear{ENDS[name]}", f"apple{ENDS[name]}"]
    assert spans(encode_chat(tokenizer, template(name), TURNS, train_on="last")) == [f"apple{ENDS[name]}"]


def test_blocks_of_generation_that_touch_are_one_turn() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% generation %}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_start|>{% endif %}{% endfor %}"
    )
    tokens = encode_chat(speaker()[0], compile_template(source, NAMES, "test"), TURNS)
    assert speaker()[0].decode(tokens.ids, skip_special=False) == "two<|im_start|>pear<|im_end|>one<|im_start|>apple<|im_end|>"
    assert spans(tokens) == ["pear<|im_end|>", "apple<|im_end|>"]
    last = encode_chat(speaker()[0], compile_template(source, NAMES, "test"), TURNS, train_on="last")
    assert spans(last) == ["apple<|im_end|>"]


QUIET = {"enable_thinking": False}


@pytest.fixture
def folder() -> Path:
    """A folder with a tokenizer and Qwen 3's published template."""
    made = write_folder(None, {**NAMES, "clean_up_tokenization_spaces": False})
    (made / "tokenizer.json").write_text(speaker()[1].backend_tokenizer.to_str(), encoding="utf-8")
    (made / "chat_template.jinja").write_text(PUBLISHED["qwen3"], encoding="utf-8")
    return made


@pytest.mark.parametrize("where", ["model", "table", "over the model's", "mixed"])
def test_an_option_reaches_training_prompts_and_pairs(where: str, folder: Path, tmp_path: Path) -> None:
    tokenizer, hf, said = open_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder), TURNS[:2]
    chat_template = open_template(folder, tokenizer)
    if where in ("model", "over the model's"):
        chat_template = with_options(
            chat_template, {"enable_thinking": where == "over the model's"} if where != "model" else QUIET, "[model]"
        )
    file, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    file.write_text(json.dumps({"messages": said}) + "\n", encoding="utf-8")
    other.write_text(json.dumps({"prompt": "two", "chosen": "pear", "rejected": "plum"}) + "\n", encoding="utf-8")
    source = Source(str(file), "chat", 64, chat_template_kwargs=QUIET if where in ("table", "over the model's") else {})
    if where == "mixed":
        source = msgspec.structs.replace(source, mix=(MixtureComponent(str(file), 0.5, chat_template_kwargs=QUIET),)).parts()[1]
    whole = hf.apply_chat_template(said, **QUIET, return_dict=False)
    prompt = hf.apply_chat_template(said[:1], **QUIET, add_generation_prompt=True, return_dict=False)
    assert hf.decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n")

    trained = prepare(source, tokenizer, chat_template, tmp_path / "cache")
    assert trained.tokens.tolist() == whole
    assert trained.mask.tolist() == [len(prompt) <= i < len(whole) - 1 for i in range(len(whole))]  # the last one is a line's end
    assert [one.ids for one in prompts(source, tokenizer, chat_template)] == [prompt]
    assert [one.reference for one in prompts(source, tokenizer, chat_template)] == ["pear"]
    compared = preference.prepare(
        msgspec.structs.replace(source, path=str(other), format="pairs"), tokenizer, chat_template, tmp_path / "cache"
    )
    chosen = compared.answers.at(0)
    assert chosen.tokens.tolist() == whole
    assert chosen.mask.tolist() == trained.mask.tolist()
    if where == "model":
        assert encode_prompt(tokenizer, chat_template, said[:1]) == prompt


def test_an_option_changes_what_is_trained(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    chat_template = open_template(folder, tokenizer)
    assert spans(encode_chat(tokenizer, chat_template, TURNS[:2])) == ["<think>\n\n</think>\n\npear<|im_end|>"]
    assert spans(encode_chat(tokenizer, with_options(chat_template, QUIET, "here"), TURNS[:2])) == ["pear<|im_end|>"]


@pytest.mark.parametrize("name", TEXT)
def test_the_answer_that_a_model_is_compared_with_is_the_one_that_it_was_taught(name: str, tmp_path: Path) -> None:
    """A perfect model writes every trained token: Qwen 3's empty thought before the words too."""
    tokenizer, hf = speaker()
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": TURNS[:2]}) + "\n", encoding="utf-8")
    try:
        trained = encode_chat(tokenizer, template(name), TURNS[:2], train_on="last")
    except InputError:
        pytest.skip("no answer of this template can be trained")
    taught = [i for i, is_trained in zip(trained.ids, trained.mask, strict=True) if is_trained]
    if "pear" not in hf.decode(taught):
        pytest.skip("this template wants content as a list of parts")
    (one,) = prompts(Source(str(file), "chat", 64), tokenizer, template(name))
    assert one.reference_ids == taught[: len(one.reference_ids)]
    assert "pear" in one.reference
    assert ("<think>" in one.reference) == ("<think>" in hf.decode(taught))


GLM = {
    "a turn": (TURNS[:2], []),
    "turns": (TURNS, []),
    "reasoning": (CONVERSATIONS["reasoning"][0], []),
    "a thought": (CONVERSATIONS["thoughts"][0][:2], []),
    "a call": ([user("a"), assistant("", tool_calls=[CALL])], [FUNCTION]),
    "after a call": ([*CONVERSATIONS["tools"][0], assistant("nine")], [FUNCTION]),
}


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in GLM), *((name, QUIET) for name in ("a turn", "turns", "a call", "after a call"))],
)
def test_an_answer_that_no_token_ends_is_trained_up_to_the_turn_that_follows(name: str, options: dict[str, Any]) -> None:
    """GLM 4 stops where the user's or the tool's turn begins; TRL's training template writes these tokens."""
    messages, tools = GLM[name]
    tokenizer, hf = speaker()
    wanted_ids = hf.apply_chat_template(
        messages, tools=tools or None, chat_template=PUBLISHED["glm4moe_training"], return_dict=False, **options
    )
    answer = encode_answer(tokenizer, with_options(template("glm4moe"), options, "here"), messages, tools=tools)
    prompt = hf.apply_chat_template(
        messages[:-1],
        tools=tools or None,
        chat_template=PUBLISHED["glm4moe"],
        add_generation_prompt=True,
        return_dict=False,
        **options,
    )
    assert answer.ids == wanted_ids
    assert answer.mask == [n >= len(prompt) for n in range(len(wanted_ids))]


@pytest.mark.parametrize("name", ["glm4moe", "qwen3"])
def test_a_thought_after_a_prompt_that_closed_its_own_is_refused(name: str) -> None:
    for messages, _ in (GLM["reasoning"], GLM["a thought"]):
        with pytest.raises(InputError, match=rf"chat: {name} "):
            encode_answer(speaker()[0], with_options(template(name), QUIET, "here"), messages)


def test_an_answer_that_no_token_ends_stops_at_the_users_turn() -> None:
    tokenizer = speaker()[0]
    assert stop_ids(tokenizer, template("glm4moe")) == [tokenizer.special["<|user|>"], tokenizer.eos_id]


def test_a_prompt_that_is_no_part_of_what_a_turn_becomes_is_refused(folder: Path) -> None:
    """Without thinking Qwen 3 opens a turn with an empty thought, which it drops once the turn is history."""
    tokenizer = open_tokenizer(folder)
    chat_template = with_options(open_template(folder, tokenizer), QUIET, "here")
    with pytest.raises(InputError, match=r'render message 2 \(assistant\) after its generation prompt.* set train_on = "last"'):
        encode_chat(tokenizer, chat_template, TURNS)
    assert spans(encode_chat(tokenizer, chat_template, TURNS, train_on="last")) == ["apple<|im_end|>"]


def test_an_option_that_no_template_asks_for_is_refused(folder: Path, tmp_path: Path) -> None:
    chat_template = open_template(folder, open_tokenizer(folder))
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": TURNS}) + "\n", encoding="utf-8")
    source = Source(str(file), "chat", 64, chat_template_kwargs={"thinking": True})
    message = r"a.jsonl chat_template_kwargs has 'thinking', expected what .*jinja asks for: enable_thinking; did you mean"
    for read in (prepare, preference.prepare):
        one = source if read is prepare else msgspec.structs.replace(source, format="pairs")
        with pytest.raises(InputError, match=message):
            read(one, open_tokenizer(folder), chat_template, tmp_path / "cache")
    with pytest.raises(InputError, match=message):
        prompts(source, open_tokenizer(folder), chat_template)
    for name in ("messages", "tools", "add_generation_prompt", "bos_token", "raise_exception", "reasoning_content"):
        with pytest.raises(InputError, match=rf"chat: here chat_template_kwargs has '{name}', expected what .* asks for: enable"):
            with_options(chat_template, {name: 1}, "here")
    with pytest.raises(InputError, match=r"chat_template_kwargs has 'enable_thinking', expected what llama3 asks for: nothing$"):
        with_options(template("llama3"), QUIET, "here")


def test_the_template_for_tools_is_told_too() -> None:
    chat_template = template("llama3")._replace(tool_use=template("qwen3"))
    quiet = with_options(chat_template, QUIET, "here")
    assert ours(quiet, TURNS[:3], [FUNCTION], True) == theirs("qwen3", TURNS[:3], [FUNCTION], True, QUIET)
    assert ours(quiet, TURNS[:3], [], True) == theirs("llama3", TURNS[:3], [], True, {})
