"""Inspect verb: what a model or adapter folder holds, in words."""

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minitune.cli.command_result import CommandResult
from minitune.cli.failures import DONE, REFUSED
from minitune.cli.folder_facts import (
    ADAPTER,
    ADAPTER_CONFIG,
    ORIGIN,
    TokenizerFiles,
    n_parameters,
    tensor_entries,
    weight_files,
)
from minitune.cli.folder_words import (
    context,
    count,
    dtypes,
    listed,
    not_trained,
    number,
    quantization_words,
    sequence,
    shape,
    stops,
    template_files,
    tied_head,
)
from minitune.cli.model_folders import require_folder, result_of
from minitune.errors import InputError, printable
from minitune.io.foreign_weights import foreign_weights
from minitune.io.json_file import read_json_object
from minitune.io.paths import locate
from minitune.io.safetensors_header import Entry
from minitune.io.state_files import missing_file, read_parts, tensor_files, whole_entries
from minitune.io.units import format_bytes
from minitune.programs.records import read_rows
from minitune.programs.trained_state import TrainedState
from minitune.text.folder_files import text_files

# of all experts of a layer, one rank after the other
JOINED = re.compile(r".*\.experts(\.base_layer)?\.lora_A\.weight")


class FolderSummary(NamedTuple):
    """Content of a folder in words, by topic, and the faults of its files."""

    rows: dict[str, str]
    faults: list[str]


def inspect(word: str) -> CommandResult:
    """Print what a folder (or demo) holds, as a table, and return it; exit code 2 if a file is
    missing or damaged, told on stderr.

    InputError for what is no model and no adapter folder.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    word = require_folder(word, "inspect", "a model, an adapter or a run folder")
    found = result_of(word, "inspect")
    if isinstance(found, TrainedState):
        rows, faults = summarize_state(found)
        rows |= _best_heldout(found.run)
    else:
        rows, faults = summarize(locate(found))
        if found != word:
            rows = {"folder": found, **rows, **_best_heldout(locate(word))}
    console = Console()
    if not console.is_terminal:
        # whoever reads a pipe wants one line a topic, whatever the width
        width = max(map(len, rows))
        lines = [f"{name:{width}}  {printable(value)}\n" for name, value in rows.items()]
        sys.stdout.write("".join(lines))
        return _told(rows, faults)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(printable(value)))
    console.print(table)
    return _told(rows, faults)


def _told(rows: Mapping[str, str], faults: Sequence[str]) -> CommandResult:
    """Rows and faults with the exit code, after each fault is told on stderr."""
    for fault in faults:
        sys.stderr.write(f"inspect: {printable(fault)}\n")
    return CommandResult({"rows": rows, "faults": faults}, REFUSED if faults else DONE)


def summarize(folder: Path) -> FolderSummary:
    """Content of a model or adapter folder; InputError for any other folder, and for JSON that
    can't be read.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        rows, faults = _adapter(folder)
    elif (folder / "config.json").is_file():
        rows, faults = _model(folder)
    else:
        foreign = foreign_weights(folder)
        what = f"; {foreign[0]}: {foreign[1]}" if foreign is not None else ""
        raise InputError(
            f"inspect: {folder} holds neither config.json nor {ADAPTER_CONFIG}, expected a model "
            f"or adapter folder{what}"
        )
    sizes = [path.stat().st_size for path in folder.iterdir() if path.is_file()]
    return FolderSummary({**rows, "files": f"{len(sizes)}, {format_bytes(sum(sizes))}"}, faults)


def summarize_state(state: TrainedState) -> FolderSummary:
    """Content of a saved state of training: what it trains, how far it is, and on what."""
    prefix = "trainable."
    all_entries, faults = _state_entries(state.folder)
    entries = {name: entry for name, entry in all_entries.items() if name.startswith(prefix)}
    lora = state.lora
    if lora is None:
        trains = "whole weights"
    else:
        trains = f"deltas of rank {lora['rank']}, alpha {lora['alpha']}"
    steps, epochs = state.stage.get("steps"), state.stage.get("epochs")
    planned = f"of {steps:,}" if steps else f"({epochs} epochs are planned)"
    rows = {
        "training": f"{state.label} of {state.run}",
        "step": f"{state.step:,} {planned}",
        "trains": trains,
        "parameters": count(sum(entry.numel for entry in entries.values())),
        "dtypes": dtypes(entries),
        "base": str(state.model.get("path") or state.model.get("config")),
        "folder": str(state.folder),
        "opens": f'chat {state.run}, merge {state.run}, [model] deltas = "{state.run}"',
    }
    return FolderSummary(rows, faults)


def _state_entries(folder: Path) -> tuple[dict[str, Entry], list[str]]:
    """(whole tensors of a saved state by name, what is wrong with its files)."""
    files, remedy = tensor_files(folder), f"remove {folder} to continue from the step before"
    missing = missing_file(files)
    if missing is not None:
        return {}, [f"{missing} does not exist, expected it beside {files[0].name}; {remedy}"]
    try:
        return whole_entries(read_parts(files)), []
    except ValueError as error:
        return {}, [f"{error}; {remedy}"]


def _best_heldout(run: Path) -> dict[str, str]:
    """Lowest loss on held-out rows that each training stage of a run measured, and at which step;
    nothing of a run that measured none."""
    best: dict[str, tuple[float, int]] = {}
    for stage, step, line in read_rows(run / "metrics.jsonl"):
        loss = json.loads(line).get("heldout_loss")
        # a loss that is not finite is a text there
        if isinstance(loss, float):
            best[stage] = min((loss, step), best.get(stage, (loss, step)))
    words = [f"{loss:.4f} nats at step {step:,} of {stage}" for stage, (loss, step) in best.items()]
    return {"best held-out": ", ".join(words)} if words else {}


def _model(folder: Path) -> FolderSummary:
    config = read_json_object(folder / "config.json", "inspect", optional=True)
    inner = config.get("text_config")
    # of a multimodal model, what reads and writes text
    text = {**config, **inner} if isinstance(inner, dict) else config
    nested = [config] if text is config else [inner, config]
    names, faults = weight_files(folder)
    entries, damage = tensor_entries(folder / name for name in names)
    quantization = text.get("quantization_config") or text.get("compression_config")
    quantization = quantization if isinstance(quantization, dict) else {}
    tied = text.get("tie_word_embeddings")
    head = any(name.endswith("lm_head.weight") for name in entries)
    tokens = TokenizerFiles.of(folder)
    rows = {
        "family": ", text of ".join(str(one.get("model_type")) for one in nested),
        "architecture": listed(config.get("architectures")),
        "parameters": count(
            sum(n_parameters(name, entry, quantization) for name, entry in entries.items())
        ),
        "dtypes": dtypes(entries),
        "shape": shape(text),
        "context": context(text),
        "vocabulary": (
            f"{number(text.get('vocab_size'))} in the embedding, {number(tokens.size)} in the "
            "tokenizer"
        ),
        "tied head": tied_head(tied, head),
        "quantized": quantization_words(quantization),
        "not trained": not_trained(entries),
        "left out of saves": "auto_map" if config.get("auto_map") else "",
        "tokenizer": tokens.kind,
        "special tokens": tokens.named(),
        "stops at": stops(folder, text, tokens),
        "template": template_files(folder, tokens),
    }
    return FolderSummary({name: value for name, value in rows.items() if value}, [*faults, *damage])


def _adapter(folder: Path) -> FolderSummary:
    config = read_json_object(folder / ADAPTER_CONFIG, "inspect", optional=True)
    entries, damage = tensor_entries([folder / ADAPTER])
    origin = read_json_object(folder / ORIGIN, "inspect", optional=True).get("base") or {}
    origin = origin if isinstance(origin, dict) else {}
    named = {"use_dora": "DoRA", "use_rslora": "rsLoRA"}
    kinds = [word for key, word in named.items() if config.get(key)]
    joined = sum(JOINED.fullmatch(name) is not None for name in entries)
    tokens = TokenizerFiles.of(folder)
    has_text = bool(text_files(folder))
    rows = {
        "adapter": " ".join(kinds) or str(config.get("peft_type")),
        "rank": _ranks(entries) or number(config.get("r")),
        "joined experts": f"{joined} tensors" if joined else "",
        "alpha": f"{config.get('lora_alpha')}",
        "targets": _targets(config),
        "trained whole": listed(config.get("modules_to_save")),
        "parameters": count(sum(entry.numel for entry in entries.values())),
        "dtypes": dtypes(entries),
        "base": str(config.get("base_model_name_or_path")),
        "base fingerprint": str(origin.get("fingerprint") or ""),
        "base quantized": quantization_words(origin.get("quantization") or {}) if origin else "",
        "tokenizer": tokens.kind if has_text else "",
        "template": template_files(folder, tokens) if has_text else "",
    }
    return FolderSummary({name: value for name, value in rows.items() if value}, damage)


def _ranks(entries: Mapping[str, Entry]) -> str:
    """Ranks of an adapter's deltas, and in how many modules each is."""
    ranks = Counter(
        entry.shape[0]
        for name, entry in entries.items()
        if ".lora_A" in name and entry.shape and not JOINED.fullmatch(name)
    )
    return ", ".join(f"{rank} in {n} modules" for rank, n in sorted(ranks.items()))


def _targets(config: Mapping[str, Any]) -> str:
    """Ends of the names of adapted modules and parameters, and how many have each."""
    targets = config.get("target_modules")
    places = [
        *(targets if isinstance(targets, list) else [targets]),
        *sequence(config.get("target_parameters")),
    ]
    ends = Counter(str(place).removesuffix(".weight").rpartition(".")[2] for place in places)
    return ", ".join(f"{name} x {n}" if n > 1 else name for name, n in ends.items())
