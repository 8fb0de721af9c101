"""TOML: lines of keys, errors that name a place, and text that reads back equal."""

import datetime
import string
import tomllib
from typing import Annotated, Any, Literal

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from minitune.errors import InputError
from minitune.io import toml, toml_messages
from minitune.io.toml_writing import dumps

pytestmark = pytest.mark.fast


class Sgd(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="sgd", tag_field="kind"):
    lr: Annotated[float, msgspec.Meta(gt=0)]


class Adamw(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="adamw", tag_field="kind"):
    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    style: Literal["pure", "fused"] = "pure"


class Fit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="fit", tag_field="op"):
    steps: Annotated[int, msgspec.Meta(gt=0)]
    optimizer: Sgd | Adamw
    name: str | None = None

    def __post_init__(self) -> None:
        if self.steps == 13:
            raise ValueError("13 steps, expected a luckier number")


class Keep(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="keep", tag_field="op"):
    what: str = "all"
    after: Sgd | Adamw = Adamw(lr=0.5)


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str
    seq_len: int = 5


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    title: str
    data: dict[str, Source] = msgspec.field(default_factory=dict)
    stage: tuple[Fit | Keep, ...]


GOOD = """\
title = "x"  # [not] = { a, table }

[data.a]
path = "a.jsonl"
[data.b]
path = "b.jsonl"

[[stage]]
op = "fit"
steps = 3
optimizer = { kind = "sgd", lr = 1 }

[[stage]]
op = "keep"
"""


def decoded(text: str) -> Plan:
    lines = toml.key_lines(text)

    def where(path: toml_messages.KeyPath) -> str:
        return f"plan:{next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), 0)}"

    return toml.decode(toml.parse(text, "plan"), Plan, where)


def test_decodes() -> None:
    sources = {"a": Source("a.jsonl"), "b": Source("b.jsonl")}
    assert decoded(GOOD) == Plan(title="x", data=sources, stage=(Fit(3, Sgd(1.0)), Keep()))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "x"', 'titel = "x"', "plan:1: titel is unknown, expected one of data, stage, title; did you mean 'title'?"),
        ('title = "x"', "", "plan:0: title is missing, expected str; add it"),
        (
            "steps = 3",
            "stepz = 3",
            r"plan:10: stage[0].stepz is unknown, expected one of name, op, optimizer, steps; did you mean",
        ),
        ("steps = 3", "", "plan:8: stage[0].steps is missing, expected int; add it"),
        ("steps = 3", "steps = 0", "plan:10: stage[0].steps is 0, expected int >= 1"),
        ("steps = 3", "steps = 3.5", "plan:10: stage[0].steps is 3.5, expected int"),
        ("steps = 3", "steps = 13", "plan:8: stage[0]: 13 steps, expected a luckier number"),
        ("steps = 3", "steps = 3\nname = 3", "plan:11: stage[0].name is 3, expected str"),
        ("lr = 1", "rl = 1", "plan:11: stage[0].optimizer.rl is unknown, expected one of kind, lr; did you mean 'lr'?"),
        ("lr = 1", "momentum = 1", "plan:11: stage[0].optimizer.momentum is unknown, expected one of kind, lr"),
        ("lr = 1", 'lr = "fast"', 'plan:11: stage[0].optimizer.lr is "fast", expected float'),
        ('kind = "sgd", ', "", "plan:11: stage[0].optimizer.kind is missing, expected one of adamw, sgd; add it"),
        ('"sgd"', '"sgdd"', "plan:11: stage[0].optimizer.kind is \"sgdd\", expected one of adamw, sgd; did you mean 'sgd'?"),
        ('"sgd"', '"adamw", style = "fusd"', "style is \"fusd\", expected one of fused, pure; did you mean 'fused'?"),
        ('"sgd"', '"adamw", betas = [1, true]', "plan:11: stage[0].optimizer.betas[1] is true, expected float"),
        ('op = "keep"', 'op = "kepp"', "plan:14: stage[1].op is \"kepp\", expected one of fit, keep; did you mean 'keep'?"),
        ('op = "keep"', "op = 3", "plan:14: stage[1].op is 3, expected str"),
        ('op = "keep"', "", "plan:13: stage[1].op is missing, expected one of fit, keep; add it"),
        ('path = "b.jsonl"', "path = [1]", "plan:6: data.b.path is an array of 1, expected str"),
        ('path = "b.jsonl"', 'pth = "b"', "plan:6: data.b.pth is unknown, expected one of path, seq_len; did you mean 'path'?"),
        ('path = "b.jsonl"', "", "plan:5: data.b.path is missing, expected str; add it"),
        ("[data.b]\npath", "data.b", "plan:5: data.a.data is unknown, expected one of path, seq_len"),
    ],
)
def test_decode_names_the_place_and_the_nearest_name(old: str, new: str, message: str) -> None:
    assert GOOD.count(old) == 1
    with pytest.raises(InputError) as error:
        decoded(GOOD.replace(old, new))
    assert message in str(error.value)
    assert str(error.value).startswith("plan:")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1\nb = = 2\n", "f.toml:2: column 5: Invalid value, expected TOML"),
        ("a = 1\nb =", "f.toml:2: end of file: Invalid value, expected TOML"),
        ("a = 1\na = 2\n", "f.toml:2: "),
        ("a = " + "[" * 5000, "f.toml: brackets nested too deeply, expected TOML"),
        ("a = 1" + "0" * 5000, "f.toml: Exceeds the limit"),
    ],
)
def test_parse_names_the_line(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        toml.parse(text, "f.toml")
    assert message in str(error.value)


def test_key_lines_of_every_form() -> None:
    text = '''\
plain = 1
dotted.key."with.dot" = 2024-01-01 00:00:00
[table]
text = """
fake = 1
[fake]
"""  # comment = 3
raw = \'\'\'
[[fake]]\'\'\'
list = [  # [a]
  1, [2.5,
  3],
  { a = "}", b.c = ']' },
]
[[rows]]
x = "\\" y = 3"
[[rows]]
inline = { p = { q = 1 }, r = [] }
[rows.sub]
deep = 1.5e-3
[[rows.more]]
z = 1
[[rows.more]]
z = 1
'''
    lines = toml.key_lines(text)
    expected: dict[toml_messages.KeyPath, int] = {
        ("plain",): 1,
        ("dotted",): 2,
        ("dotted", "key"): 2,
        ("dotted", "key", "with.dot"): 2,
        ("table",): 3,
        ("table", "text"): 4,
        ("table", "raw"): 8,
        ("table", "list"): 10,
        ("table", "list", 0): 11,
        ("table", "list", 1): 11,
        ("table", "list", 1, 0): 11,
        ("table", "list", 1, 1): 12,
        ("table", "list", 2): 13,
        ("table", "list", 2, "a"): 13,
        ("table", "list", 2, "b"): 13,
        ("table", "list", 2, "b", "c"): 13,
        ("rows",): 15,
        ("rows", 0): 15,
        ("rows", 0, "x"): 16,
        ("rows", 1): 17,
        ("rows", 1, "inline"): 18,
        ("rows", 1, "inline", "p"): 18,
        ("rows", 1, "inline", "p", "q"): 18,
        ("rows", 1, "inline", "r"): 18,
        ("rows", 1, "sub"): 19,
        ("rows", 1, "sub", "deep"): 20,
        ("rows", 1, "more"): 21,
        ("rows", 1, "more", 0): 21,
        ("rows", 1, "more", 0, "z"): 22,
        ("rows", 1, "more", 1): 23,
        ("rows", 1, "more", 1, "z"): 24,
    }
    assert lines == expected


def test_default_at_is_what_an_absent_table_stands_for() -> None:
    raw = toml.parse(GOOD, "plan")
    assert toml.default_at(Plan, raw, ("stage", 1, "after")) == {
        "kind": "adamw",
        "lr": 0.5,
        "betas": [0.9, 0.95],
        "style": "pure",
    }
    for path in [("stage", 1, "what"), ("stage", 0, "optimizer"), ("stage", 0, "after"), ("data",), ("data", "a"), ("absent",)]:
        assert toml.default_at(Plan, raw, path) == {}


texts = st.text(st.characters(codec="utf-8"), max_size=8)
keys = st.text(string.ascii_letters + "-_.'\"\n é", min_size=1, max_size=5)
leaves = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    texts,
    st.dates(),
    st.times(),
    st.datetimes(),
    st.datetimes(timezones=st.just(datetime.UTC)),
)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8)
trees = st.dictionaries(keys, values, max_size=5)


def paths(tree: Any, path: toml_messages.KeyPath = ()) -> list[toml_messages.KeyPath]:
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [p for key, child in children for p in [(*path, key), *paths(child, (*path, key))]]


@given(trees)
def test_dumps_reads_back_equal(tree: dict[str, Any]) -> None:
    assert tomllib.loads(dumps(tree)) == tree


@given(trees)
def test_key_lines_finds_every_path_and_no_other(tree: dict[str, Any]) -> None:
    text = dumps(tree)
    lines = toml.key_lines(text)
    assert set(lines) == set(paths(tree))
    assert all(1 <= line <= text.count("\n") for line in lines.values())


def test_dumps_leaves_none_out_and_refuses_what_toml_lacks() -> None:
    assert dumps({"a": None, "t": {"b": None, "c": {"d": None}}, "n": 1}) == "n = 1\n\n[t]\nc = {}\n"
    with pytest.raises(TypeError, match=r"toml: \(?<object .* \(object\) has no TOML form, expected str, number, bool"):
        dumps({"a": object()})


@given(st.text("[]{}=,.\"'#\n ab1\\\r\té", max_size=40))
def test_key_lines_survives_whatever_is_valid(text: str) -> None:
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    assert set(toml.key_lines(text)) == set(paths(tree))
