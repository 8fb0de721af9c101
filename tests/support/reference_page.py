"""Page docs/reference.md, written from the structs that a program or a model shape is decoded into.

    PYTHONPATH=tests python -m support.reference_page      writes the page anew

A key is described by the comment beside its field, a table by its docstring.
"""

import re
from collections.abc import Mapping, Sequence

from msgspec.inspect import StructType

from minitune.io.field_comments import first_sentence
from minitune.io.json_schema import tables_of
from minitune.io.key_types import Key, keys_of, structs_in
from minitune.models.config import DecoderConfig
from minitune.models.open import FAMILIES
from minitune.programs.program import Program
from support.paths import ROOT

PAGE = ROOT / "docs/reference.md"
COMMAND = "PYTHONPATH=tests python -m support.reference_page"
INTRODUCTION = f"""\
# Every key of a program

A program is a TOML file. It has keys of its own, the tables `[model]`, `[data.NAME]` and `[log]`, and a list of stages
`[[stage]]`; some keys of these are tables again, such as `optimizer = {{ kind = "adamw", lr = 1e-4 }}`. What each of them
holds stands below. A key whose default is "required" must be given, and one whose default is "absent" may be left out.

`minitune PROGRAM --help` lists the keys of one program with its values. `minitune schema` describes all of them for an editor.

The keys of a shape file, in which a model without weights is described, stand [at the end](#a-model-shape).

This page is written by `{COMMAND}` from the comments beside the fields in `minitune/`.
"""
SHAPES = """\
## A model shape
A shape file, such as `configs/models/llama-125m.toml`, says what a model without weights is made of; `[model] config` of a
program names it. Its first key is `family`, one of [these](#families), and the others are those below. A pattern over depth,
such as `layer_types`, is a list that repeats from the first layer to the last.
"""
FAMILY_DEFAULTS = """\
## Families
What a family has as its own default of a key, or must be given.

| family | its own defaults |
|---|---|
"""

Groups = Mapping[str, Sequence[StructType]]  # heading -> the tables that may stand there


def page() -> str:
    """Whole text of the page."""
    of_programs = _part(INTRODUCTION, Program, "The program")
    of_shapes = _part(SHAPES, DecoderConfig, "The shape")
    return f"{of_programs}\n{of_shapes}\n{FAMILY_DEFAULTS}{''.join(map(_family_row, FAMILIES))}"


def _part(introduction: str, kind: type, title: str) -> str:
    """Part of the page on one kind of file: its contents, and a section for each of its tables."""
    groups = _groups(kind, title)
    headings = {info.cls: heading for heading, infos in groups.items() for info in infos}
    contents = [_contents_line(heading, infos) for heading, infos in groups.items()]
    sections = [_group_section(heading, infos, headings) for heading, infos in groups.items()]
    return "\n".join([introduction, *contents, "", "\n\n".join(sections), ""])


def _family_row(name: str) -> str:
    """Row of a family: the keys whose default is not that of every decoder."""
    config = FAMILIES[name].config
    usual = {key.name: key.default for key in keys_of(tables_of(DecoderConfig)[0])}
    own = [key for key in keys_of(tables_of(config)[0]) if key.default != usual[key.name]]
    return f'| `family = "{name}"` | {", ".join(map(_own_default, own)) or "those above"} |\n'


def _own_default(key: Key) -> str:
    """Default of a family's key as it would be written, or that it has none."""
    return f"`{key.name}` is required" if key.default is None else f"`{key.name} = {key.default}`"


def _groups(kind: type, title: str) -> Groups:
    """Tables of a kind of file by the keys that they are values of."""
    tables = tables_of(kind)
    keys: dict[type, dict[str, None]] = {info.cls: {} for info in tables}
    for info in tables:
        for field in info.fields:
            for below in structs_in(field.type):
                keys[below.cls][f"`{field.encode_name}`"] = None
    groups: dict[str, list[StructType]] = {}
    for info in tables:
        groups.setdefault(", ".join(keys[info.cls]) or title, []).append(info)
    return groups


def _contents_line(heading: str, infos: Sequence[StructType]) -> str:
    kinds = [_link(f"`{info.tag}`", _title(info)) for info in infos if info.tag_field]
    return f"- {_link(heading, heading)}{': ' if kinds else ''}{', '.join(kinds)}"


def _group_section(heading: str, infos: Sequence[StructType], headings: Mapping[type, str]) -> str:
    """Section of one table, or of several that a tag tells apart."""
    if not infos[0].tag_field:
        (info,) = infos
        return f"## {heading}\n{_table(info, headings)}"
    kinds = [f"### {_title(info)}\n{_table(info, headings)}" for info in infos]
    told_apart = f"A table that says by its `{infos[0].tag_field}` which of these it is."
    return "\n\n".join([f"## {heading}\n{told_apart}", *kinds])


def _title(info: StructType) -> str:
    return f'`{info.tag_field} = "{info.tag}"`'


def _table(info: StructType, headings: Mapping[type, str]) -> str:
    lines = [shown_as_is(first_sentence(info.cls))]
    keys = keys_of(info)
    if keys:
        lines += ["", "| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [_row(key, headings) for key in keys]
    return "\n".join(lines)


def _row(key: Key, headings: Mapping[type, str]) -> str:
    found = dict.fromkeys(headings[info.cls] for info in key.structs)
    links = ", ".join(_link(heading, heading) for heading in found)
    kind = f"{shown_as_is(key.type)}: {links}" if links else shown_as_is(key.type)
    default = "required" if key.default is None else "absent"
    if key.default:
        default = f"`{key.default}`"
    return f"| `{key.name}` | {kind} | {default} | {shown_as_is(key.meaning)} |"


def _link(text: str, heading: str) -> str:
    """Link to the section of a heading, by the anchor that GitHub gives it."""
    anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    return f"[{text}](#{anchor})"


def shown_as_is(text: str) -> str:
    """Text that Markdown shows as it is, in a cell of a table too; `code` stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    # an underscore inside a word is shown as it is
    plain = [re.sub(r"[*|]|<(?=\w)|(?<!\w)_|_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
    code = [part.replace("|", r"\|") for part in parts[1::2]]
    return "".join(a + b for a, b in zip(plain, [*code, ""], strict=True))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
