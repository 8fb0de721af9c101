"""Inspect verb: what a model or adapter folder holds, in words."""

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minitune.cli.folder_facts import (
    ADAPTER,
    ADAPTER_CONFIG,
    ORIGIN,
    TokenizerFiles,
    bits_of,
    n_parameters,
    tensor_entries,
    weight_names,
)
from minitune.cli.model_folders import result_of
from minitune.errors import InputError, printable
from minitune.io.json_file import read_json_object
from minitune.io.paths import locate
from minitune.io.safetensors_header import BITS, Entry
from minitune.io.tensor_names import described, is_unmodelled
from minitune.io.units import format_bytes
from minitune.programs.trained_state import TrainedState
from minitune.text.folder_files import DEFAULT, TOOL_USE, template_texts, text_files

CHATML = ("<|im_start|>", "<|im_end|>")
# of all experts of a layer, one rank after the other
JOINED = re.compile(r".*\.experts(\.base_layer)?\.lora_A\.weight")


class FolderSummary(NamedTuple):
    """Content of a folder in words, by topic, and the faults of its files."""

    rows: dict[str, str]
    faults: list[str]


def inspect(word: str) -> int:
    """Print what a folder (or demo) holds, as a table, and return 0; 2 if a file is missing or
    damaged, told on stderr.

    InputError for what is no model and no adapter folder.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = result_of(word, "inspect")
    if isinstance(found, TrainedState):
        rows, faults = training_state(found)
    else:
        rows, faults = summarize(locate(found))
        if found != word:
            rows = {"folder": found, **rows}
    console = Console()
    if not console.is_terminal:
        # whoever reads a pipe wants one line a topic, whatever the width
        width = max(map(len, rows))
        lines = [f"{name:{width}}  {printable(value)}\n" for name, value in rows.items()]
        sys.stdout.write("".join(lines))
        return _tell(faults)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(printable(value)))
    console.print(table)
    return _tell(faults)


def _tell(faults: Sequence[str]) -> int:
    """Exit code, after each fault is told on stderr."""
    for fault in faults:
        sys.stderr.write(f"inspect: {printable(fault)}\n")
    return 2 if faults else 0


def summarize(folder: Path) -> FolderSummary:
    """Content of a model or adapter folder; InputError for any other folder, and for JSON that
    can't be read.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        rows, faults = _adapter(folder)
    elif (folder / "config.json").is_file():
        rows, faults = _model(folder)
    else:
        raise InputError(
            f"inspect: {folder} holds neither config.json nor {ADAPTER_CONFIG}, expected a model "
            "or adapter folder"
        )
    sizes = [path.stat().st_size for path in folder.iterdir() if path.is_file()]
    return FolderSummary({**rows, "files": f"{len(sizes)}, {format_bytes(sum(sizes))}"}, faults)


def training_state(state: TrainedState) -> FolderSummary:
    """Content of a saved state of training: what it trains, how far it is, and on what."""
    prefix = "trainable."
    all_entries, faults = tensor_entries([state.folder / "state.safetensors"])
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
        "parameters": _count(sum(entry.numel for entry in entries.values())),
        "dtypes": _dtypes(entries),
        "base": str(state.model.get("path") or state.model.get("config")),
        "folder": str(state.folder),
        "opens": f'chat {state.run}, merge {state.run}, [model] deltas = "{state.run}"',
    }
    return FolderSummary(rows, faults)


def _model(folder: Path) -> FolderSummary:
    config = read_json_object(folder / "config.json", "inspect", optional=True)
    inner = config.get("text_config")
    # of a multimodal model, what reads and writes text
    text = {**config, **inner} if isinstance(inner, dict) else config
    names, faults = weight_names(folder)
    entries, damage = tensor_entries(folder / name for name in names)
    quantization = text.get("quantization_config") or text.get("compression_config")
    quantization = quantization if isinstance(quantization, dict) else {}
    tied = text.get("tie_word_embeddings")
    head = any(name.endswith("lm_head.weight") for name in entries)
    tokens = TokenizerFiles.of(folder)
    rows = {
        "family": ", text of ".join(
            str(c.get("model_type")) for c in ([inner, config] if text is not config else [config])
        ),
        "architecture": _listed(config.get("architectures")),
        "parameters": _count(
            sum(n_parameters(name, entry, quantization) for name, entry in entries.items())
        ),
        "dtypes": _dtypes(entries),
        "shape": _shape(text),
        "context": _context(text),
        "vocabulary": (
            f"{_number(text.get('vocab_size'))} in the embedding, {_number(tokens.size)} in the "
            "tokenizer"
        ),
        "tied head": _tied_head(tied, head),
        "quantized": _quantized(quantization),
        "not trained": _unmodelled(entries),
        "left out of saves": "auto_map" if config.get("auto_map") else "",
        "tokenizer": tokens.kind,
        "special tokens": tokens.named(),
        "stops at": _stops(folder, text, tokens),
        "template": _template(folder, tokens),
    }
    return FolderSummary({name: value for name, value in rows.items() if value}, [*faults, *damage])


def _adapter(folder: Path) -> FolderSummary:
    config = read_json_object(folder / ADAPTER_CONFIG, "inspect", optional=True)
    entries, damage = tensor_entries([folder / ADAPTER])
    origin = read_json_object(folder / ORIGIN, "inspect", optional=True).get("base") or {}
    targets = config.get("target_modules")
    places = [
        *(targets if isinstance(targets, list) else [targets]),
        *_sequence(config.get("target_parameters")),
    ]
    ends = Counter(str(place).removesuffix(".weight").rpartition(".")[2] for place in places)
    ranks = Counter(
        e.shape[0]
        for name, e in entries.items()
        if ".lora_A" in name and e.shape and not JOINED.fullmatch(name)
    )
    joined = sum(JOINED.fullmatch(name) is not None for name in entries)
    kinds = [
        word for key, word in (("use_dora", "DoRA"), ("use_rslora", "rsLoRA")) if config.get(key)
    ]
    tokens = TokenizerFiles.of(folder)
    rows = {
        "adapter": " ".join(kinds) or str(config.get("peft_type")),
        "rank": ", ".join(f"{rank} in {n} modules" for rank, n in sorted(ranks.items()))
        or _number(config.get("r")),
        "joined experts": f"{joined} tensors" if joined else "",
        "alpha": f"{config.get('lora_alpha')}",
        "targets": ", ".join(f"{name} x {n}" if n > 1 else name for name, n in ends.items()),
        "trained whole": _listed(config.get("modules_to_save")),
        "parameters": _count(sum(entry.numel for entry in entries.values())),
        "dtypes": _dtypes(entries),
        "base": str(config.get("base_model_name_or_path")),
        "base fingerprint": str(origin.get("fingerprint") or "")
        if isinstance(origin, dict)
        else "",
        "base quantized": _quantized(origin.get("quantization") or {})
        if isinstance(origin, dict) and origin
        else "",
        "tokenizer": tokens.kind if text_files(folder) else "",
        "template": _template(folder, tokens) if text_files(folder) else "",
    }
    return FolderSummary({name: value for name, value in rows.items() if value}, damage)


def _tied_head(tied: Any, head: Any) -> str:
    """Whether the head shares the embedding's weight: as config.json says, or as the weights do."""
    if tied is None:
        return "no (not said)" if head else "yes (not said)"
    return "yes" if tied else "no"


def _unmodelled(entries: Mapping[str, Entry]) -> str:
    """Words for tensors that no decoder of text has, which saves of the text model carry."""
    beside = {name: entry for name, entry in entries.items() if is_unmodelled(name)}
    n_bytes = sum(entry.end - entry.start for entry in beside.values())
    return f"{described(beside)}, {format_bytes(n_bytes)}" if beside else ""


def _quantized(quantization: Any) -> str:
    if not isinstance(quantization, dict) or not quantization:
        return "no"
    words = [quantization.get(key) for key in ("quant_method", "scheme", "format", "fmt")]
    return f"{' '.join(str(word) for word in words if word) or 'yes'}, {bits_of(quantization)} bits"


def _dtypes(entries: Mapping[str, Entry]) -> str:
    sizes: Counter[str] = Counter()
    for entry in entries.values():
        sizes[entry.dtype] += entry.end - entry.start
    return (
        ", ".join(f"{dtype} {format_bytes(n)}" for dtype, n in sizes.most_common())
        if set(sizes) <= set(BITS)
        else ""
    )


def _shape(config: Mapping[str, Any]) -> str:
    words = [
        ("num_hidden_layers", "{} layers"),
        ("hidden_size", "d_model {}"),
        ("num_attention_heads", "{} heads"),
        ("num_key_value_heads", "{} for keys and values"),
        ("head_dim", "d_head {}"),
        ("intermediate_size", "d_ff {}"),
        ("num_experts", "{} experts"),
        ("num_local_experts", "{} experts"),
        ("num_experts_per_tok", "{} a token"),
    ]
    return ", ".join(
        dict.fromkeys(word.format(config[key]) for key, word in words if config.get(key))
    )


def _context(config: Mapping[str, Any]) -> str:
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    rope = rope if isinstance(rope, dict) else {}
    # nested by the kind of layer
    rope = next((value for value in rope.values() if isinstance(value, dict)), rope)
    kind = rope.get("rope_type") or rope.get("type")
    words = [f"{_number(config.get('max_position_embeddings'))} tokens"]
    if kind not in (None, "default"):
        words.append(f"RoPE {kind} x {rope['factor']}" if rope.get("factor") else f"RoPE {kind}")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return ", ".join([*words, *([f"window {_number(window)}"] if window else [])])


def _stops(folder: Path, config: Mapping[str, Any], tokens: TokenizerFiles) -> str:
    generation = read_json_object(folder / "generation_config.json", "inspect", optional=True)
    stop_ids = _sequence(generation.get("eos_token_id", config.get("eos_token_id")))
    texts = {i: text for text, i in tokens.ids.items()}
    return ", ".join(f"{texts.get(i, '')} {i}".strip() for i in stop_ids if isinstance(i, int))


def _template(folder: Path, tokens: TokenizerFiles) -> str:
    """File that the chat template stands in, and which others there are."""
    try:
        named = {name: Path(text.origin) for name, text in template_texts(folder).items()}
    except InputError as error:
        return f"none that can be read ({error})"
    if not named:
        kind = "ChatML" if all(text in tokens.ids for text in CHATML) else "plain"
        return f"none; the built-in {kind} one is used"
    default = named.pop(DEFAULT).name
    words = [default.partition(" ")[0]]
    for name in sorted(named):
        use = "for conversations with tools" if name == TOOL_USE else "not used"
        words.append(f"{name} {use}")
    return ", ".join(words)


def _sequence(value: Any) -> Sequence[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _listed(value: Any) -> str:
    return ", ".join(str(one) for one in _sequence(value))


def _number(value: Any) -> str:
    if value is None:
        return "not said"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _count(n: int) -> str:
    short = next(
        (
            f" ({n / size:.2f} {unit})"
            for size, unit in ((10**9, "billion"), (10**6, "million"))
            if n >= size
        ),
        "",
    )
    return f"{n:,}{short}"
