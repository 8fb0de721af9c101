"""Model card of what a run has saved: the README.md of a repository."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minitune.programs.card.opened_with import ResultKind, kind_of, opened_with
from minitune.programs.page.page import data_lines, stage_table
from minitune.programs.page.run_files import RunFiles
from minitune.programs.records import Sample
from minitune.programs.variables import value_of

FILE = "README.md"
GIVEN_AWAY = ("upload", "version")  # records of stages that make nothing
N_CURVE_ROWS = 10
CARD_SAMPLES = 3  # sample answers, unless another number is asked for
LIBRARIES: dict[ResultKind, str] = {
    "adapter": "peft",
    "gguf": "gguf",
    "onnx": "onnx",
    "executorch": "executorch",
}  # of the Hub; transformers else
RELATIONS: dict[ResultKind, str] = {"adapter": "adapter", "model": "finetune"}  # quantized else
SEAL = re.compile(r"\n<!-- written by minitune ([0-9a-f]{16}) -->\n\Z")
HUB_NAME = re.compile(r"(?:hf:)?(\w[\w.-]*/\w[\w.-]*)", re.ASCII)


class Subject(NamedTuple):
    """Subject of a card: what lies at a place, the repository it goes to, and where it is from."""

    place: Path
    repo: str  # OWNER/NAME
    run: RunFiles | None = None  # that saved it
    base: str | None = None  # OWNER/NAME of its base, where the run's path does not say it
    n_samples: int = CARD_SAMPLES  # sample answers to show


def model_card(subject: Subject) -> str:
    """Card of what a run has saved, with a seal by which an edited one is told from it."""
    kind, run = kind_of(subject.place), subject.run
    base = subject.base or (base_name(run) if run is not None else None)
    parts = [_head(kind, base, run), f"# {subject.repo.partition('/')[2]}"]
    parts += [_opening(kind, base, run)]
    if run is not None:
        parts += [*_figures(run), *_curves(run), *_samples(run, subject.n_samples), *_data(run)]
    parts += ["## How to load it", *opened_with(kind, subject.place, subject.repo, base)]
    if run is not None:
        parts += _program(run)
    text = "\n\n".join(parts) + "\n"
    return f"{text}\n<!-- written by minitune {_hash(text)} -->\n"


def is_unedited(card: str) -> bool:
    """True for a card that is as model_card wrote it."""
    seal = SEAL.search(card)
    return seal is not None and _hash(card[: seal.start()]) == seal[1]


def base_name(run: RunFiles) -> str | None:
    """Name at the Hub of the model that a run began with; None where its path does not say it."""
    path = (run.program.get("model") or {}).get("path")
    if not isinstance(path, str):
        return None
    path = value_of(path, run.manifest.get("variables", {}))
    if path.startswith("hf:"):
        named = HUB_NAME.match(path)
        return named[1] if named else None
    folder = Path(path)
    # `minitune download` and `hf download --local-dir` leave a record of each file
    is_fetched = (folder / ".cache/huggingface").is_dir()
    name = "/".join(folder.parts[-2:])
    return name if is_fetched and HUB_NAME.fullmatch(name) else None


def _head(kind: ResultKind, base: str | None, run: RunFiles | None) -> str:
    """Lines of YAML that the Hub reads; a JSON string is one of YAML."""
    lines = [
        f"library_name: {LIBRARIES.get(kind, 'transformers')}",
        "pipeline_tag: text-generation",
    ]
    if base is not None:
        lines += [f"base_model: {json.dumps(base)}"]
        lines += [f"base_model_relation: {RELATIONS.get(kind, 'quantized')}"]
    else:
        lines += ["# base_model: OWNER/NAME  # fill in what it was trained on"]
    stages = run.program.get("stage", []) if run is not None else []
    kinds = {str(stage.get("op")) for stage in stages}
    losses = {_tag(str(stage["loss"].get("kind"))) for stage in stages if "loss" in stage}
    tags = ["minitune", *sorted(kinds & {"lora", "qat"}), *sorted(losses), *_quantized(kind)]
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    data = run.program.get("data", {}) if run is not None else {}
    sets = sorted({name for table in data.values() for name in _data_sets(table)})
    lines += ["datasets:", *(f"- {json.dumps(name)}" for name in sets)] if sets else []
    lines += ["# license: apache-2.0  # fill in yours; the license of the base model may bind you"]
    return "\n".join(["---", *lines, "---"])


def _tag(loss: str) -> str:
    """Word by which the Hub tags a loss."""
    return "sft" if loss == "cross_entropy" else loss


def _quantized(kind: ResultKind) -> list[str]:
    return [kind] if kind not in ("adapter", "model") else []


def _data_sets(table: Mapping[str, Any]) -> Iterator[str]:
    """Yield names of data sets of the Hub in a table of data."""
    paths = table.get("path")
    paths = [paths] if isinstance(paths, str) else paths or []
    named = (HUB_NAME.match(path) for path in paths if path.startswith("hf:"))
    yield from (match[1] for match in named if match)
    for part in table.get("mix", []):
        yield from _data_sets(part)


def _opening(kind: ResultKind, base: str | None, run: RunFiles | None) -> str:
    what = {"adapter": "A PEFT adapter", "model": "A model", "gguf": "A GGUF file"}
    words = [what.get(kind, f"A model in the format {kind}")]
    source = base or ((run.program.get("model") or {}).get("path") if run is not None else None)
    if source is not None:
        linked = f"[{base}](https://huggingface.co/{base})" if base else f"`{source}`"
        words += [f"fine-tuned from {linked}" if kind != "gguf" else f"made from {linked}"]
    words += ["with minitune"]
    seed = f", seed {run.program.get('seed', 0)}" if run is not None else ""
    return f"{' '.join(words)}{seed}."


def _figures(run: RunFiles) -> Iterator[str]:
    made = {name: one for name, one in run.typed.items() if one.what not in GIVEN_AWAY}
    head, rows = stage_table(made)
    if rows:
        yield "## Before and after"
        yield _table(head, rows)


def _curves(run: RunFiles) -> Iterator[str]:
    """Yield tables of losses and rates over the steps of each training stage."""
    for stage, rows in run.rows.items():
        steps = [row for row in rows if "loss" in row and row.get("adapter") is None]
        if not steps:
            continue
        every = max(1, len(steps) // N_CURVE_ROWS)
        chosen = [*steps[:-1:every], steps[-1]]
        heldout = {row["step"]: row["heldout_loss"] for row in rows if "heldout_loss" in row}
        cells = [_curve_row(row, heldout) for row in chosen]
        yield f"## Curve of `{stage}`"
        yield _table(("step", "loss [nats]", "held-out loss [nats]", "learning rate"), cells)


def _curve_row(row: Mapping[str, Any], heldout: Mapping[int, float]) -> list[str]:
    """Cells of a step; its held-out loss is the last that was measured by then."""
    known = [step for step in heldout if step <= row["step"]]
    last = f"{heldout[max(known)]:.4f}" if known else ""
    rate = f"{row['lr']:.3g}" if "lr" in row else ""
    return [f"{row['step']:,}", f"{row['loss']:.4f}", last, rate]


def _samples(run: RunFiles, n_samples: int) -> Iterator[str]:
    evaluations = {name: one.samples for name, one in run.typed.items() if one.samples}
    if not evaluations or n_samples == 0:
        return
    yield "## Samples"
    for sample in next(iter(evaluations.values()))[:n_samples]:
        yield f"Prompt:\n{_fenced(str(sample.prompt))}"
        yield f"Reference:\n{_fenced(sample.reference)}"
        for name, others in evaluations.items():
            yield from (f"`{name}`:\n{_fenced(text)}" for text in _answers(others, sample))


def _answers(samples: Sequence[Sample], asked: Sample) -> list[str]:
    return [sample.answer for sample in samples if sample.prompt == asked.prompt]


def _data(run: RunFiles) -> Iterator[str]:
    tables = run.program.get("data", {})
    if not tables:
        return
    yield "## Data"
    rows = [[name, f"`{table.get('path', 'a mix')}`"] for name, table in tables.items()]
    yield _table(("table", "path"), rows)
    lines = data_lines(run)
    if lines:
        yield _fenced("\n".join(lines))


def _program(run: RunFiles) -> Iterator[str]:
    versions = (run.manifest.get("starts") or [{}])[-1].get("versions", {})
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "## Program"
    yield f"`python -m minitune program.toml` made it, with {listed or 'minitune'}."
    yield f"<details><summary>program.toml</summary>\n\n{_fenced(run.program_text, 'toml')}\n"
    yield "</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def _fenced(text: str, language: str = "text") -> str:
    """Text as a block of code, between fences that are longer than any in it."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip(chr(10))}\n{fence}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
