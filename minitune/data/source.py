"""Sources: which files hold the rows, in which format and under which columns."""

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from minitune.errors import InputError, nearest
from minitune.io import paths
from minitune.text.turns import TrainOn
from minitune.types import OpenUnitInterval, PositiveInt

COLUMNS = {
    "instruct": ("instruction", "input", "output"),
    "chat": ("messages", "tools"),
    "text": ("text",),
    "pairs": ("prompt", "chosen", "rejected", "tools"),
    "unpaired": ("prompt", "completion", "label", "chosen", "rejected", "tools"),
}
EXPECTED = {str: "a string", list: "a list of messages", bool: "true or false"}
Single = Literal["instruct", "chat", "text"]  # the formats whose rows are one document each


class Split(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One part of a file in two: a row is held out where a hash of what it says falls below the fraction.

    So no row changes sides when others come or go, and rows that say the same stand on the same side.
    """

    fraction: OpenUnitInterval  # of the rows, that are held out
    part: Literal["train", "heldout"]

    def takes(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is of this part."""
        said = hashlib.sha256(msgspec.json.encode(row, order="deterministic", enc_hook=str)).digest()
        heldout = int.from_bytes(said[:8]) < self.fraction * 2**64
        return heldout == (self.part == "heldout")


class MixtureComponent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Another file whose documents are mixed into a table's own."""

    path: str
    share: OpenUnitInterval  # of the documents of an epoch, the table's own having the rest
    format: Single | None = None  # the table's own if absent
    columns: dict[str, str] = {}
    split: Split | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # the table's own if absent


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One data file and how to read it; columns: the format's own name of a column -> its name in the file.

    An epoch goes once through the file and, with `mix`, through as many documents of each other file as its share asks for:
    the next ones of that file's own endless shuffled order, so that over the epochs all of them come equally often.
    """

    path: str
    format: Literal["instruct", "chat", "text", "pairs", "unpaired"]  # the last two are read by data.preference.prepare
    seq_len: PositiveInt  # tokens
    packed: bool = True
    overlong: Literal["truncate", "drop"] = "drop"
    columns: dict[str, str] = {}
    train_on: TrainOn = "assistant"  # of a conversation: every turn of the assistant, its last one, or every token
    split: Split | None = None
    mix: tuple[MixtureComponent, ...] = ()
    chat_template_kwargs: dict[str, Any] = {}  # told to the chat template, over those of [model]

    def __post_init__(self) -> None:
        for format, columns in ((self.format, self.columns), *((one.format or self.format, one.columns) for one in self.mix)):
            _check_columns(format, columns)
        if self.format not in ("instruct", "chat") and self.train_on != "assistant":
            trained = "every token" if self.format == "text" else "the answer"
            raise InputError(
                f"data: train_on = {self.train_on!r} with format = {self.format!r}, expected it with instruct or chat only; "
                f"remove it: {trained} is trained"
            )
        if self.format == "text" and self.chat_template_kwargs:
            raise InputError("data: chat_template_kwargs with format = 'text', expected it with conversations only; remove it")
        if self.mix and self.format in ("pairs", "unpaired"):
            raise InputError(f"data: mix with format = {self.format!r}, expected instruct, chat or text; remove it")
        if (total := sum(one.share for one in self.mix)) >= 1:
            raise InputError(
                f"data: mix has shares of {total:g} together, expected less than 1; the table's own file has the rest"
            )

    def parts(self) -> "list[Source]":
        """The table's own file and then those that are mixed in, each as a table of its own."""
        others = [
            msgspec.structs.replace(
                self,
                path=str(paths.locate(one.path)),
                format=one.format or self.format,
                columns=one.columns,
                split=one.split,
                train_on="assistant" if one.format == "text" else self.train_on,
                chat_template_kwargs=self._told(one),
                mix=(),
            )
            for one in self.mix
        ]
        return [msgspec.structs.replace(self, mix=()), *others]

    def _told(self, one: MixtureComponent) -> dict[str, Any]:
        if one.chat_template_kwargs is not None:
            return one.chat_template_kwargs
        return {} if one.format == "text" else self.chat_template_kwargs


def column(row: Mapping[str, Any], name: str, kinds: tuple[type, ...], source: Source, where: str) -> Any:
    """The value of a column, under the name that the source gives it; InputError if it is missing or of none of the kinds."""
    key = source.columns.get(name, name)
    expected = " or ".join(EXPECTED[kind] for kind in kinds)
    if key not in row:
        raise InputError(
            f'data: {where} has no "{key}" (only {", ".join(row) or "nothing"}), expected {expected}; '
            f'name the column with columns = {{ {name} = "..." }}'
        )
    if not isinstance(row[key], kinds):
        raise InputError(f'data: {where} "{key}" is a {type(row[key]).__name__}, expected {expected}; correct the line')
    return row[key]


def _check_columns(format: str, columns: Mapping[str, str]) -> None:
    for name in columns:
        if name not in COLUMNS[format]:
            raise InputError(
                f"data: columns names {name!r}, expected {' or '.join(COLUMNS[format])} with format = "
                f"{format!r}{nearest(name, COLUMNS[format])} (the name here = the name in the file)"
            )
