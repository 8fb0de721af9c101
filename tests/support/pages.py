"""Pages of the documentation, done as they say: a reader writes their files and runs their commands, at toy size.

A fence ```toml mine.toml is a file that the reader writes. Lines of a ```bash fence that run minitune are run in this process,
```python is executed, in one namespace a page, ```toml decodes, and each line of ```jsonl is JSON. After a fence with show-sample
alone, ```text are lines that it prints.
"""

import contextlib
import io
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from minitune import hardware
from minitune.__main__ import main
from minitune.cli import download, publishing
from minitune.cli.command_line import RUN_WORDS
from minitune.cli.model_folders import with_model
from minitune.cli.verbs import HELP_WORDS, VERBS, program_file
from minitune.errors import InputError
from minitune.programs import program
from minitune.programs.stages.export import Export
from minitune.registry.hub_upload import Uploaded
from support.paths import ROOT
from support.programs import SHIPPED, small_stages, toy

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)(?: (\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ASSIGNMENT = re.compile(r"[\w.-]+=")

# Commands of other tools, which no test runs.
SERVING = {"vllm", "llama-cli", "llama-server", "ollama"}
OTHER_TOOLS = {
    "pip",
    "hf",
    "wandb",
    "mlflow",
    "tensorboard",
    "trackio",
    "mkdocs",
    "torchrun",
    "docker",
    "az",
    "adb",
    "python launch/azureml/submit.py",
    "python bench/demo/make.py",
    *SERVING,
}
# Paths that stand for the reader's own, and what the tests have in their place.
READERS_OWN = {
    "/path/to/folder": "model",
    "train.jsonl": "orders-train.jsonl",
    "heldout.jsonl": "orders-heldout.jsonl",
    "pairs.jsonl": "orders-pairs.jsonl",
}
# Commands of a page that the reader only has `check` look at, and what runs them: they take long, and once is enough.
RUN_ELSEWHERE = {
    ("docs/export.md", "phone.toml"): "tests/interop/test_executorch.py",  # as it is, with a model for its kernels
    ("docs/sharding.md", "full --ranks 2 plan=fsdp train.steps=4"): "docs/launching.md",
}
# Words that are added to a command by its verb or program, beside the sizes of its stages.
TOY_WORDS = {"chat": ["--max-new-tokens", "4"]}
TYPED = "Two lamps to Oslo.\n"


class Block(NamedTuple):
    """Fenced block of a page."""

    page: Path
    line: int  # of its first line, below the fence
    language: str
    file: str  # that the reader is told to write; "" for none
    text: str

    def place(self, line: int = 0) -> str:
        """Page and line, as an editor opens it."""
        return f"{self.page.relative_to(ROOT)}:{self.line + line}"


def blocks_of(page: Path, language: str | None = None) -> list[Block]:
    """Fenced blocks of a page in their order, all or those of a language."""
    text = page.read_text("utf-8")
    found = [Block(page, text.count("\n", 0, m.start()) + 2, m[1], m[2] or "", m[3]) for m in FENCE.finditer(text)]
    return [block for block in found if language in (None, block.language)]


def commands_of(block: Block) -> Iterator[tuple[int, str]]:
    """Commands of a block, each with its line in it: without comments, and put together where a backslash parts them."""
    begun, start = "", 0
    for number, line in enumerate(block.text.splitlines()):
        code = re.sub(r"(^|\s+)#( .*)?$", "", line).strip()
        start = start if begun else number
        begun = f"{begun} {code}".strip()
        if begun.endswith("\\"):
            begun = begun.removesuffix("\\").strip()
            continue
        if begun:
            yield start, begun
        begun = ""


class Reader:
    """Someone who does what a page says, in a folder of their own and with a tiny model."""

    def __init__(self, folder: Path, tiny: Path, patch: pytest.MonkeyPatch, stop_at: Callable[[int], None]) -> None:
        self.folder, self.tiny, self.patch, self.stop_at = folder, tiny, patch, stop_at
        self.given: set[str] = set()  # runs that the page takes as given
        patch.chdir(folder)
        patch.setattr(download, "fetch", self._fetch)
        patch.setattr(publishing, "publish", lambda *_, **__: Uploaded("https://huggingface.co/OWNER/NAME", "0" * 40, 1))
        for name, own in READERS_OWN.items():
            if not name.startswith("/"):
                shutil.copyfile(tiny / own, folder / name)

    def read(self, page: Path) -> dict:
        """Do all that a page says; returns the names that its Python defines. AssertionError with page and line for a fault."""
        names: dict = {}
        shown = ""
        for block in blocks_of(page):
            if block.file:
                (self.folder / block.file).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / block.file).write_text(block.text, encoding="utf-8")
            if block.language == "toml":
                decode_toml(block)
            elif block.language == "jsonl":
                decode_jsonl(block)
            elif block.language == "python":
                if block not in [snippet for file in only_checked_files(page) for snippet in snippets_about(page, file)]:
                    execute(block, names)
            elif block.language == "bash":
                commands = [(block.place(line), only_checked(command, page)) for line, command in commands_of(block)]
                outputs = [self.run(command, place) for place, command in commands]
                shown = outputs[0] if "show-sample" in block.text and len(outputs) == 1 else ""
            elif block.language == "text" and shown:
                for number, line in enumerate(block.text.splitlines()):
                    assert line in shown.splitlines(), f"{block.place(number)}: show-sample does not print this line"
                shown = ""
        return names

    def run(self, command: str, place: str) -> str:
        """Output of one command, at toy size; "" for the tools of others, which are not run."""
        words = shlex.split(command)
        while words and re.match(r"[A-Z_]+=", words[0]):
            self.patch.setenv(*words.pop(0).split("=", 1))
        if words[:3] != ["python", "-m", "minitune"]:
            known = words[0] in OTHER_TOOLS or " ".join(words[:2]) in OTHER_TOOLS
            assert known, f"{place}: {words[0]} is no command of minitune, and not in OTHER_TOOLS of support/pages.py"
            return ""
        words = [self._own(word) for word in words[3:]]
        self._begin_runs(words)
        try:
            words = self._at_toy_size(words)
        except InputError as error:
            raise AssertionError(f"{place}: {command}: {error}") from None
        with self.patch.context() as patch:
            if words[0] == "plan" and "--measure" not in words:
                # for any other processor every block of a weight that would be widened is traced, which takes seconds
                patch.setattr(hardware, "multiplies_bfloat16", lambda device: True)
            code, output, errors = self._main(words)
        assert code == 0, f"{place}: {command} ended with {code}: {errors}"
        return output

    def _main(self, words: Sequence[str]) -> tuple[int, str, str]:
        output, errors = io.StringIO(), io.StringIO()
        self.patch.setattr("sys.stdin", io.StringIO(TYPED))
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = main(words)
        return code, output.getvalue(), errors.getvalue()

    def _own(self, word: str) -> str:
        for name, own in READERS_OWN.items():
            if name.startswith("/"):
                word = word.replace(name, str(self.tiny / own))
        return word

    def _at_toy_size(self, words: list[str]) -> list[str]:
        """Words with those that make a program small: its data and model, if they are the demo's, and its stages."""
        verb, *rest = words[1:] if words[0] in RUN_WORDS else words
        added = TOY_WORDS.get(verb, [])
        takes_program = verb not in VERBS or "PROGRAM" in VERBS[verb].usage
        if not takes_program or any(word in HELP_WORDS for word in rest):
            return [verb, *rest, *added]
        name, after = (verb, rest) if verb not in VERBS else (rest[0], rest[1:])
        changes = [word for word in after if ASSIGNMENT.match(word) or word == after[0]]
        loaded = program.load(program_file(name), with_model([w for w in changes if not w.startswith("-")], name))
        # tracing takes seconds a layer
        traces = any(isinstance(stage, Export) and stage.format in ("onnx", "executorch") for stage in loaded.stage)
        model = self.tiny / ("one-layer" if traces else "model")
        small = [] if loaded.model.path != "demo" else [f"model.path={model}"]
        for key, source in loaded.data.items():
            is_demo = isinstance(source.path, str) and source.path.startswith("demo/")
            if is_demo and source.split is not None and source.split.part == "heldout":
                small.append("data.train.holdout=0.3")
            elif is_demo:
                small.append(f"data.{key}.path={self.tiny / Path(str(source.path)).name}")
        small += [*small_stages(loaded, self.tiny), *added]
        keys = {word.partition("=")[0] for word in small}
        # a key is given as steps or as epochs
        kept = [word for word in words if word.partition("=")[0].replace(".epochs", ".steps") not in keys]
        return [*kept, *small]

    def _begin_runs(self, words: list[str]) -> None:
        """Have the runs that a command takes as given: those of shipped programs, stopped on their way."""
        for word in words:
            found = re.fullmatch(r"runs/(\w+)", word)
            if found is None or found[1] not in SHIPPED:
                continue
            folder = self.folder / word
            if word in self.given and (folder / "summary.json").exists():
                shutil.rmtree(folder)
            if not folder.exists():
                self.given.add(word)
                self.stop_at(3)
                code, _, errors = self._main([found[1], *toy(found[1], self.tiny, self.folder / "runs", steps=5)])
                assert code > 128, errors

    def _fetch(self, repo: str, revision: str, folder: Path, tell: Callable[[str], None]) -> tuple[dict[str, int], str]:
        """The tiny model, in the folder that a download would fill."""
        shutil.copytree(self.tiny / "model", folder)
        return {file.name: file.stat().st_size for file in folder.iterdir()}, "0" * 40


def only_checked(command: str, page: Path) -> str:
    """The command, with `check` where something else runs it; `check` is of one process."""
    start = "python -m minitune "
    if not any((ROOT / place, start + words) == (page, command) for place, words in RUN_ELSEWHERE):
        return command
    return re.sub(r" --ranks \d+", "", command.replace(start, f"{start}check ", 1))


def only_checked_files(page: Path) -> list[str]:
    """Files of a page whose programs something else runs."""
    return [words for place, words in RUN_ELSEWHERE if page == ROOT / place and words.endswith(".toml")]


def snippets_about(page: Path, file: str) -> list[Block]:
    """Python of a page that reads what the program in one of its files has written."""
    return [block for block in blocks_of(page, "python") if f"runs/{Path(file).stem}/" in block.text]


def execute(block: Block, names: dict) -> None:
    """Run a snippet with names that it finds and adds to; a traceback shows the line of the page."""
    exec(compile("\n" * (block.line - 1) + block.text, str(block.page), "exec"), names)


def file_of(page: Path, name: str) -> str:
    """Text of a file that a page tells its reader to write."""
    (text,) = (block.text for block in blocks_of(page) if block.file == name)
    return text


def executed(page: Path) -> dict:
    """Names that the Python snippets of a page define, run in order."""
    names: dict = {}
    for block in blocks_of(page, "python"):
        execute(block, names)
    return names


def decode_toml(block: Block) -> None:
    """AssertionError for a block that is no TOML, or holds a key that a program does not have."""
    try:
        raw = tomllib.loads(block.text)
    except tomllib.TOMLDecodeError as error:
        raise AssertionError(f"{block.place()}: {error}") from None
    if not raw.keys() <= set(program.Program.__struct_fields__):
        return  # the lines of one table
    for table in raw.get("data", {}).values():
        table.pop("holdout", None)  # these two are resolved before a program is decoded
        table["format"] = table.get("format", "text").replace("auto", "text")
    try:
        msgspec.convert(raw, program.Program)
    except msgspec.ValidationError as error:
        if "missing required field" not in str(error):  # a page shows the keys that it speaks of
            raise AssertionError(f"{block.place()}: {error}") from None


def decode_jsonl(block: Block) -> None:
    """AssertionError for a line that is no JSON."""
    for number, line in enumerate(block.text.splitlines()):
        try:
            json.loads(line)
        except json.JSONDecodeError as error:
            raise AssertionError(f"{block.place(number)}: {error}") from None
