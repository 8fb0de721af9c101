"""Sources: which files hold the rows, in which format and under which columns."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from minitune.data.files import data_files
from minitune.data.row_formats import COLUMNS, advice
from minitune.errors import InputError, nearest
from minitune.text.conversation import TrainOn
from minitune.types import OpenUnitInterval, PositiveInt

# Formats whose rows are preferences: two answers to a prompt, or single answers that are labelled.
PREFERENCE_FORMATS = ("pairs", "unpaired")
MAX_NAMED = 4  # paths that a message names
EXPECTED = {
    str: "a string",
    list: "a list of messages",
    bool: "true or false",
    int: "0 or 1",
    dict: "a message",
}
Single = Literal["instruct", "chat", "text"]  # the formats whose rows are one document each


class Split(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the two parts of a file: a row is held out if a hash of its content falls below the
    fraction.

    So no row changes sides when others come or go, and equal rows are on the same side.
    """

    fraction: OpenUnitInterval  # share of the rows that are held out
    part: Literal["train", "heldout"]  # the rows to read: those that are held out, or the others

    def takes(self, row: Mapping[str, Any]) -> bool:
        """Return True if a row is in this part."""
        content = msgspec.json.encode(row, order="deterministic", enc_hook=str)
        digest = hashlib.sha256(content).digest()
        is_heldout = int.from_bytes(digest[:8]) < self.fraction * 2**64
        return is_heldout == (self.part == "heldout")


class MixtureComponent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Another file, whose documents are mixed with those of a table's own file."""

    path: str | tuple[str, ...]  # as the table's own
    share: OpenUnitInterval  # of the documents of an epoch; the table's own file has the rest
    format: Single | None = None  # the table's own if absent
    columns: dict[str, str] = {}  # name of a column in the format -> its name in this file
    split: Split | None = None  # the part of this file that is read; all of it if absent
    chat_template_kwargs: dict[str, Any] | None = None  # the table's own if absent


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Data file and how to read it.

    An epoch goes once through the file. With `mix` it also takes as many documents of each other
    file as that file's share says: the next ones of an endless shuffled order, so that over the
    epochs all of them come equally often.
    """

    # a file, a glob, a folder, a split of a data set of the Hub (hf:OWNER/NAME/CONFIG:SPLIT, of
    # which config and split may be left out where there is one), or a list of these
    path: str | tuple[str, ...]
    # what a row holds, as docs/data.md shows; auto: by the columns of the first row
    format: Literal["instruct", "chat", "text", "pairs", "unpaired", "auto"]
    # tokens of a row at most; auto: as many as the longest row has, rounded up, and at most 4,096
    seq_len: PositiveInt | Literal["auto"] = "auto"
    # short documents share a row, in which none sees another; false: a row for each
    packed: bool = True
    # more tokens than seq_len: cut, left out, or (split) a text becomes several samples
    overlong: Literal["truncate", "drop", "split"] = "drop"
    # name of a column in the format -> its name in the file: { output = "answer" }
    columns: dict[str, str] = {}
    # of a conversation: every turn of the assistant, its last one, or every token
    train_on: TrainOn = "assistant"
    split: Split | None = None  # the part of the file that is read; all of it if absent
    mix: tuple[MixtureComponent, ...] = ()  # other files, whose documents are mixed in
    chat_template_kwargs: dict[str, Any] = {}  # options of the chat template, over those of [model]
    # of a conversation: one sample, or each answer one, its prompt as it is served
    turns: Literal["whole", "each"] = "whole"
    system_in_user: bool = False  # a system message is put at the start of the user's first one
    invalid: Literal["refuse", "skip"] = "refuse"  # rows that can't be read: stop, or count them
    # in a program: share of the rows that are kept apart as table [data.heldout], by a hash of
    # their content
    holdout: OpenUnitInterval | None = None

    def __post_init__(self) -> None:
        if self.format == "auto" or self.holdout is not None:
            raise InputError(
                "data: format = 'auto' and holdout are keys of a program, which are decided when "
                "it is loaded, expected a format and a split; write them"
            )
        self._check_files()
        self._check_trained_tokens()
        self._check_mix()

    def _check_files(self) -> None:
        """InputError for columns that the format does not have, and for a path without a name."""
        _check_columns(self.format, self.columns)
        for path in (self.path, *(other.path for other in self.mix)):
            if not path or not all(_list_of(path)):
                expected = "expected a file, a glob, a folder or a list of them"
                raise InputError(f"data: path names no file, {expected}; write one")
        for other in self.mix:
            _check_columns(other.format or self.format, other.columns)

    def _check_trained_tokens(self) -> None:
        """InputError for keys of conversations with another format, and for keys that disagree."""
        if self.format not in ("instruct", "chat") and self.train_on != "assistant":
            trained = "every token" if self.format == "text" else "the answer"
            raise InputError(
                f"data: train_on = {self.train_on!r} with format = {self.format!r}, expected it "
                f"with instruct or chat only; remove it: {trained} is trained"
            )
        if self.format not in ("instruct", "chat") and self.turns != "whole":
            found = f"data: turns = {self.turns!r} with format = {self.format!r}"
            raise InputError(f"{found}, expected it with instruct or chat; remove it")
        kinds = {self.format, *(other.format or self.format for other in self.mix)}
        if self.overlong == "split" and kinds != {"text"}:
            raise InputError(
                f'data: overlong = "split" with format = {self.format!r}, expected it with text '
                'only: a part of a conversation is no conversation; take "drop" or "truncate"'
            )
        if self.turns == "each" and self.train_on != "assistant":
            found = f'data: turns = "each" with train_on = {self.train_on!r}'
            raise InputError(f'{found}, expected train_on = "assistant"; remove one of them')
        if self.format == "text" and self.chat_template_kwargs:
            raise InputError(
                "data: chat_template_kwargs with format = 'text', expected it with conversations "
                "only; remove it"
            )

    def _check_mix(self) -> None:
        """InputError for a mixture of preference data, and for shares that leave nothing."""
        if self.mix and self.format in PREFERENCE_FORMATS:
            raise InputError(
                f"data: mix with format = {self.format!r}, expected instruct, chat or text; "
                "remove it"
            )
        total = sum(other.share for other in self.mix)
        if total >= 1:
            raise InputError(
                f"data: mix has shares of {total:g} together, expected less than 1; the table's "
                "own file has the rest"
            )

    def with_paths(self, resolve: Callable[[str], Sequence[Path]]) -> "Source":
        """Source with the paths of its own file and of those that are mixed in resolved.

        resolve: places that a path means, one but for a data set that lies in several files.
        """

        def resolved(path: str | tuple[str, ...]) -> str | tuple[str, ...]:
            places = tuple(str(place) for one in _list_of(path) for place in resolve(one))
            return places[0] if isinstance(path, str) and len(places) == 1 else places

        mix = tuple(msgspec.structs.replace(other, path=resolved(other.path)) for other in self.mix)
        return msgspec.structs.replace(self, path=resolved(self.path), mix=mix)

    @property
    def max_seq_len(self) -> int:
        """Tokens of a row at most; InputError where seq_len is "auto", which a program decides."""
        if self.seq_len == "auto":
            found = f'data: {self.path_names} has seq_len = "auto"'
            raise InputError(f"{found}, expected a number outside of a program; write one")
        return self.seq_len

    @property
    def path_names(self) -> str:
        """Own paths, as messages name them."""
        first, *others = _list_of(self.path)
        is_short = len(others) < MAX_NAMED
        return ", ".join((first, *others)) if is_short else f"{first} and {len(others)} more"

    def files(self) -> list[Path]:
        """Files of the table's own paths, in the order in which they are read.

        InputError for a path that means no file, and for a file that two paths mean.
        """
        files: dict[Path, None] = {}
        for path in _list_of(self.path):
            for file in data_files(Path(path)):
                if file in files:
                    found = f"data: {file} is meant twice by path ({self.path_names})"
                    raise InputError(f"{found}, expected each file once; correct the list")
                files[file] = None
        return list(files)

    def paths_by_key(self, table: str) -> dict[str, str]:
        """Paths of the table and of what is mixed in, by their keys: {"data.train.path": ...}."""
        paths = {f"data.{table}.path": self.path}
        paths |= {f"data.{table}.mix[{i}].path": other.path for i, other in enumerate(self.mix)}
        by_key: dict[str, str] = {}
        for key, path in paths.items():
            if isinstance(path, str):
                by_key[key] = path
            else:
                by_key |= {f"{key}[{i}]": one for i, one in enumerate(path)}
        return by_key

    def parts(self) -> "list[Source]":
        """Own file and then those that are mixed in, each as a Source of its own."""
        return [msgspec.structs.replace(self, mix=()), *(self._part(other) for other in self.mix)]

    def _part(self, other: MixtureComponent) -> "Source":
        """Source of a file that is mixed in; what its component leaves open is as in the table."""
        is_text = other.format == "text"
        options = other.chat_template_kwargs
        if options is None:
            options = {} if is_text else self.chat_template_kwargs
        return msgspec.structs.replace(
            self,
            path=other.path,
            format=other.format or self.format,
            columns=other.columns,
            split=other.split,
            train_on="assistant" if is_text else self.train_on,
            turns="whole" if is_text else self.turns,
            chat_template_kwargs=options,
            mix=(),
        )


def column(
    row: Mapping[str, Any], name: str, kinds: tuple[type, ...], source: Source, where: str
) -> Any:
    """Value of a row's column, under the name that the source gives it.

    InputError if it is missing or of none of the kinds; where = "file:line".
    """
    key = source.columns.get(name, name)
    expected = " or ".join(EXPECTED[kind] for kind in kinds)
    if key not in row:
        raise InputError(
            f'data: {where} has no "{key}" (only {", ".join(row) or "nothing"}), expected '
            f"{expected}; {advice(row, name, source.format, source.columns)}"
        )
    if not isinstance(row[key], kinds):
        # pandas writes a table column by column, each an object of its rows' numbers
        is_whole_column = isinstance(row[key], dict) and "0" in row[key]
        remedy = 'write rows: to_json(FILE, orient="records", lines=True)'
        raise InputError(
            f'data: {where} "{key}" is a {type(row[key]).__name__}, expected {expected}; '
            f"{remedy if is_whole_column else 'correct the line'}"
        )
    return row[key]


def _list_of(path: str | tuple[str, ...]) -> tuple[str, ...]:
    """Paths of a key that holds one or a list of them."""
    return (path,) if isinstance(path, str) else path


def _check_columns(format: str, columns: Mapping[str, str]) -> None:
    """InputError for a name that is no column of the format."""
    for name in columns:
        if name not in COLUMNS[format]:
            raise InputError(
                f"data: columns names {name!r}, expected {' or '.join(COLUMNS[format])} with "
                f"format = {format!r}{nearest(name, COLUMNS[format])} (the name here = the name in "
                "the file)"
            )
