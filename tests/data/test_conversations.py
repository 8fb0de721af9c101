"""Messages of rows: system prompts, history, and the many shapes that data sets have."""

from typing import Any

import pytest

from minitune.data import preference_rows
from minitune.data.conversations import messages
from minitune.data.source import Source
from minitune.errors import InputError

INSTRUCT, CHAT, PAIRS = (Source("f.jsonl", name, 8) for name in ("instruct", "chat", "pairs"))
Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}
EARLIER = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize(
    ("source", "row", "wanted"),
    [
        (INSTRUCT, {"instruction": "q", "output": "a"}, [S, Q, A]),
        (INSTRUCT, {"instruction": "q", "output": "a", "history": [["1", "2"]]}, [S, *EARLIER, Q, A]),
        (CHAT, {"messages": [Q, A]}, [S, Q, A]),
        (CHAT, {"messages": [S, Q, A]}, [S, Q, A]),
        (CHAT, {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [S, Q, A]),
        (CHAT, {"prompt": "q", "completion": "a"}, [S, Q, A]),
        (CHAT, {"prompt": [Q], "completion": [A]}, [S, Q, A]),
        (CHAT, {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}, [S, Q, A]),
    ],
)
def test_a_system_prompt_is_the_first_message(source: Source, row: dict[str, Any], wanted: list[Any], name: str) -> None:
    assert messages({**row, name: "s"}, source, "f:1") == wanted
    assert messages({**row, name: ""}, source, "f:1") == messages(row, source, "f:1")


def test_pairs_have_system_prompts_and_history_too() -> None:
    row = {"system": "s", "question": "q", "chosen": "a", "rejected": {"from": "gpt", "value": "b"}, "history": [["1", "2"]]}
    source = Source("f.jsonl", "pairs", 8, columns={"prompt": "question"})
    chosen, rejected = preference_rows.conversations(row, source, "f:1")
    assert chosen == ([S, *EARLIER, Q, A], True)
    assert rejected == ([S, *EARLIER, Q, {"role": "assistant", "content": "b"}], False)
    unpaired = {"system": "s", "prompt": "q", "completion": "a", "label": 1}
    assert preference_rows.conversations(unpaired, Source("f.jsonl", "unpaired", 8), "f:1") == [([S, Q, A], True)]


def test_a_system_message_goes_where_the_source_wants_it() -> None:
    source = Source("f.jsonl", "chat", 8, system_in_user=True)
    assert messages({"messages": [S, Q, A]}, source, "f:1") == [{"role": "user", "content": "s\n\nq"}, A]
    assert messages({"messages": [Q, A]}, source, "f:1") == [Q, A]


def test_an_empty_instruction_or_input_is_no_line() -> None:
    for instruction, context in (("q", ""), ("", "q")):
        row = {"instruction": instruction, "input": context, "output": "a"}
        assert messages(row, INSTRUCT, "f:1") == [Q, A]


def test_a_call_of_sharegpt_may_have_a_thought_before_it() -> None:
    turn = {"from": "function_call", "value": '<think>t</think>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]'}
    (found,) = messages({"conversations": [turn]}, CHAT, "f:1")
    assert found["content"] == "<think>t</think>"
    assert [call["function"]["name"] for call in found["tool_calls"]] == ["f", "g"]


@pytest.mark.parametrize(
    ("source", "row", "message"),
    [
        (CHAT, {"messages": [S, Q, A], "system": "other"}, "has a system prompt in a column of its own and another in its"),
        (CHAT, {"messages": [Q, A], "system": 3}, '"system" is a int, expected a string; correct the line'),
        (
            INSTRUCT,
            {"instruction": "q", "output": "a", "history": ["x"]},
            '"history" entry 1 is no pair of strings, expected a q',
        ),
    ],
)
def test_errors_name_the_row(source: Source, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^data: f:1 .*{message}"):
        messages(row, source, "f:1")


@pytest.mark.parametrize("asks", ["user", "User", "human"])
@pytest.mark.parametrize("answers", ["assistant", "Assistant", "gpt", "chatgpt", "ai", "bot", "model"])
def test_roles_by_other_names_are_the_same_roles(asks: str, answers: str) -> None:
    for role, content, column_name in (("role", "content", "messages"), ("from", "value", "conversations")):
        row = {column_name: [{role: asks, content: "two"}, {role: answers, content: "pears"}]}
        said = messages(row, Source("a", "chat", 8), "a:1")
        assert said == [{"role": "user", "content": "two"}, {"role": "assistant", "content": "pears"}]
    # a role of a template's own stays
    row = {"messages": [{"role": "ipython", "content": "two"}]}
    assert messages(row, Source("a", "chat", 8), "a:1") == row["messages"]
