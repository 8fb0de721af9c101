"""Splits of a data set of the Hub: which of its files hold the rows of which split.

They are those that the head of its README declares under `configs`, else those that the names of
its files show.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from minitune.errors import InputError, nearest

# hf:OWNER/NAME, which may be followed by @REVISION, /CONFIG and :SPLIT
NAME = re.compile(
    r"hf:(?P<repo>\w[\w.-]*/\w[\w.-]*)"
    r"(@(?P<revision>refs/[^/:]+/[^/:]+|[^/:]+))?(/(?P<config>[^/:]+))?(:(?P<split>[\w.-]+))?"
)
# Words in the names of files and folders -> the split that they hold.
WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(WORDS, key=len, reverse=True))})(?![a-z])", re.I)


class DataName(NamedTuple):
    """Split of a data set of the Hub, as a program's path names it."""

    repo: str
    revision: str = "main"
    config: str | None = None
    split: str | None = None


def parsed(text: str) -> DataName:
    """Name that a path hf:... holds; InputError for another spelling."""
    match = NAME.fullmatch(text)
    if match is None:
        raise InputError(
            f"hub: {text!r} is no name of a data set, expected hf:OWNER/NAME, and after it "
            "@REVISION, /CONFIG and :SPLIT where they are needed, as in hf:openai/gsm8k/main:train"
        )
    found = match.groupdict()
    return DataName(found["repo"], found["revision"] or "main", found["config"], found["split"])


def files_of(name: DataName, files: Sequence[str], card: Mapping[str, Any]) -> list[str]:
    """Files of a split, of those that hold rows; card: what the head of the README says.

    Without a config it is the one that is called the default one, without a split it is `train`;
    where there is only one, it is that. InputError for one that there is not.
    """
    if not files:
        raise InputError(
            f"hub: {name.repo} holds no file of rows, expected jsonl, json, csv, tsv, parquet or "
            f"arrow; the Hub's own copy of many data sets is hf:{name.repo}@refs/convert/parquet"
        )
    configs = dict(_declared(card, files)) or _by_folder(name, files)
    config = name.config or _default(configs, card)
    splits = _chosen(name.repo, "config", config, configs)
    split = name.split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    where = f"{name.repo}/{config}" if len(configs) > 1 else name.repo
    return _chosen(where, "split", split, splits)


def _chosen(where: str, what: str, name: str | None, known: Mapping[str, Any]) -> Any:
    if name is not None and name in known:
        return known[name]
    names = ", ".join(known) or "none"
    spelled = "/CONFIG" if what == "config" else ":SPLIT"
    if name is None:
        found = f"hub: {where} has several {what}s"
        raise InputError(f"{found}, expected one of {names}; write it after the name, {spelled}")
    found = f"hub: {where} has no {what} {name!r}"
    raise InputError(f"{found}, expected one of {names}{nearest(name, [*known]) or '; correct it'}")


def _default(configs: Mapping[str, Any], card: Mapping[str, Any]) -> str | None:
    """Config that stands for a data set where none is named."""
    marked = [one["config_name"] for one in _configs(card) if one.get("default")]
    return next((name for name in (*marked, "default") if name in configs), None) or (
        next(iter(configs)) if len(configs) == 1 else None
    )


def _configs(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Configs that a README declares; what is none of them is left out."""
    written = card.get("configs")
    written = written if isinstance(written, list) else [written]
    configs = [one for one in written if isinstance(one, dict)]
    return [{**one, "config_name": str(one.get("config_name", "default"))} for one in configs]


def _declared(
    card: Mapping[str, Any], files: Sequence[str]
) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """Yield (config, files by split) of a README that says which files these are."""
    for config in _configs(card):
        folder = str(config.get("data_dir") or "").strip("/")
        inside = [file for file in files if file.startswith(f"{folder}/" if folder else "")]
        patterns = _patterns(config.get("data_files"))
        if not patterns:
            yield config["config_name"], _by_words(inside)
            continue
        prefix = f"{folder}/" if folder else ""
        globs = {
            split: [_glob(prefix + one.removeprefix("./")) for one in ones]
            for split, ones in patterns.items()
        }
        splits = {
            split: [file for file in files if any(glob.fullmatch(file) for glob in ones)]
            for split, ones in globs.items()
        }
        yield config["config_name"], {split: found for split, found in splits.items() if found}


def _patterns(written: Any) -> dict[str, list[str]]:
    """Patterns by split: of one string or a list of them (train), or of entries with a split."""
    patterns: dict[str, list[str]] = {}
    if isinstance(written, dict):
        written = [{"split": split, "path": path} for split, path in written.items()]
    for entry in written if isinstance(written, list) else [written]:
        split, path = "train", entry
        if isinstance(entry, dict):
            split, path = str(entry.get("split", "train")), entry.get("path")
        paths = [one for one in (path if isinstance(path, list) else [path]) if one is not None]
        patterns = {**patterns, split: [*patterns.get(split, []), *map(str, paths)]}
    return {split: paths for split, paths in patterns.items() if paths}


def _glob(pattern: str) -> re.Pattern[str]:
    """Pattern of the Hub: ** goes through folders, * and ? do not."""
    parts = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(parts.get(piece, re.escape(piece)) for piece in pieces))


def _by_folder(name: DataName, files: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Files by split as their names show it, of one config or of the folder that a config names."""
    if name.config is None:
        return {"default": _by_words(files)}
    tops = {PurePosixPath(file).parts[0] for file in files if "/" in file}
    return {
        top: _by_words([file for file in files if file.startswith(f"{top}/")])
        for top in sorted(tops)
    }


def _by_words(files: Sequence[str]) -> dict[str, list[str]]:
    """Files by the split that is a word of their name, else of their folders; all train without."""
    splits: dict[str, list[str]] = {}
    for file in files:
        found = WORD.search(PurePosixPath(file).name) or WORD.search(file)
        if found is not None:
            split = WORDS[found[1].lower()]
            splits = {**splits, split: [*splits.get(split, []), file]}
    return splits or {"train": list(files)}
