"""The inspect verb: what a model or adapter folder holds, from its JSON files and tensor headers alone.

No weight is read and no torch imported, so that looking at a folder of any size takes no time.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from minitune.paths import locate
from minitune.tensorfile import BITS, Entry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER, ORIGIN = "adapter_config.json", "adapter_model.safetensors", "minitune.json"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
CHATML = ("<|im_start|>", "<|im_end|>")
RANKS = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
BESIDE_CODES = re.compile(  # what quantized formats keep beside the codes of a weight: no parameters of the model
    r".*(\.(weight_(scale|shape|zero_point|g_idx|scale_inv)|(input|output)_scale|(nested_)?(absmax|quant_map)|scales|qzeros|g_idx)"
    r"|\.quant_state\..*|_scales|rotary_emb\.inv_freq)"
)
JOINED = re.compile(r".*\.experts(\.base_layer)?\.lora_A\.weight")  # of all experts of a layer, one rank after the other
PACKED_WORDS = re.compile(r".*\.(weight_packed|qweight)")


class Facts(NamedTuple):
    """What a folder holds, in a person's words, and what is wrong with it."""

    rows: dict[str, str]
    faults: list[str]


def inspect(word: str) -> int:
    """Print what a folder (or demo) holds, as a table, and return 0; 2 if a file is missing or damaged, told on stderr.

    InputError for what is no model and no adapter folder.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows, faults = facts(locate(word))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(_printable(value)))
    Console().print(table)
    for fault in faults:
        sys.stderr.write(f"inspect: {_printable(fault)}\n")
    return 2 if faults else 0


def facts(folder: Path) -> Facts:
    """What a model or adapter folder holds; InputError for any other folder, and for JSON that can't be read."""
    if (folder / ADAPTER_CONFIG).is_file():
        rows, faults = _adapter(folder)
    elif (folder / "config.json").is_file():
        rows, faults = _model(folder)
    else:
        raise refused(f"inspect: {folder} holds neither config.json nor {ADAPTER_CONFIG}, expected a model or adapter folder")
    sizes = [path.stat().st_size for path in folder.iterdir() if path.is_file()]
    return Facts({**rows, "files": f"{len(sizes)}, {n_bytes_told(sum(sizes))}"}, faults)


def n_bytes_told(n: int) -> str:
    """Bytes as a person reads them: 512 B, 1.5 KiB, 257.3 MiB."""
    size, unit = float(n), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{n} B" if unit == "B" else f"{size:.1f} {unit}"


def refused(message: str) -> ValueError:
    """An InputError; imported here because it brings torch, which looking does not need."""
    from minitune.types import InputError

    return InputError(message)


def _model(folder: Path) -> Facts:
    config = _object(folder / "config.json")
    inner = config.get("text_config")
    text = {**config, **inner} if isinstance(inner, dict) else config  # of a multimodal model, what reads and writes text
    names, faults = _weight_names(folder)
    entries, damage = _entries(folder / name for name in names)
    quantization = text.get("quantization_config") or text.get("compression_config")
    quantization = quantization if isinstance(quantization, dict) else {}
    tied = text.get("tie_word_embeddings")
    head = any(name.endswith("lm_head.weight") for name in entries)
    tokens = _Tokens.of(folder)
    rows = {
        "family": ", text of ".join(str(c.get("model_type")) for c in ([inner, config] if text is not config else [config])),
        "architecture": _listed(config.get("architectures")),
        "parameters": _count(sum(_n_parameters(name, entry, quantization) for name, entry in entries.items())),
        "dtypes": _dtypes(entries),
        "shape": _shape(text),
        "context": _context(text),
        "vocabulary": f"{_number(text.get('vocab_size'))} in the embedding, {_number(tokens.size)} in the tokenizer",
        "tied head": f"{'yes' if (not head if tied is None else tied) else 'no'}{'' if tied is not None else ' (not said)'}",
        "quantized": _quantized(quantization),
        "tokenizer": tokens.kind,
        "special tokens": tokens.named(),
        "stops at": _stops(folder, text, tokens),
        "template": _template(folder, tokens),
    }
    return Facts({name: value for name, value in rows.items() if value}, [*faults, *damage])


def _adapter(folder: Path) -> Facts:
    config = _object(folder / ADAPTER_CONFIG)
    entries, damage = _entries([folder / ADAPTER])
    origin = _object(folder / ORIGIN).get("base") or {}
    targets = config.get("target_modules")
    places = [*(targets if isinstance(targets, list) else [targets]), *_sequence(config.get("target_parameters"))]
    ends = Counter(str(place).removesuffix(".weight").rpartition(".")[2] for place in places)
    ranks = Counter(e.shape[0] for name, e in entries.items() if ".lora_A" in name and e.shape and not JOINED.fullmatch(name))
    joined = sum(JOINED.fullmatch(name) is not None for name in entries)
    kinds = [word for key, word in (("use_dora", "DoRA"), ("use_rslora", "rsLoRA")) if config.get(key)]
    rows = {
        "adapter": " ".join(kinds) or str(config.get("peft_type")),
        "rank": ", ".join(f"{rank} in {n} modules" for rank, n in sorted(ranks.items())) or _number(config.get("r")),
        "joined experts": f"{joined} tensors" if joined else "",
        "alpha": f"{config.get('lora_alpha')}",
        "targets": ", ".join(f"{name} x {n}" if n > 1 else name for name, n in ends.items()),
        "trained whole": _listed(config.get("modules_to_save")),
        "parameters": _count(sum(entry.numel for entry in entries.values())),
        "dtypes": _dtypes(entries),
        "base": str(config.get("base_model_name_or_path")),
        "base fingerprint": str(origin.get("fingerprint") or "") if isinstance(origin, dict) else "",
        "base quantized": _quantized(origin.get("quantization") or {}) if isinstance(origin, dict) and origin else "",
    }
    return Facts({name: value for name, value in rows.items() if value}, damage)


class _Tokens(NamedTuple):
    """What tokenizer files say: the kind, how many tokens, and the added ones with their ids."""

    kind: str
    size: int | None
    ids: Mapping[str, int]
    names: Mapping[str, str]

    @staticmethod
    def of(folder: Path) -> "_Tokens":
        model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
        config = _object(folder / "special_tokens_map.json") | _object(folder / "tokenizer_config.json")
        decoder = config.get("added_tokens_decoder")
        declared = {}
        for i, token in (decoder if isinstance(decoder, dict) else {}).items():
            if i.isdecimal() and isinstance(token, dict):
                declared[str(token.get("content"))] = int(i)
        found = {name: config[name] for name in NAMED_TOKENS if config.get(name)}
        names = {name: str(token.get("content") if isinstance(token, dict) else token) for name, token in found.items()}
        if model.is_file():
            with model.open("rb") as file:
                ranks = RANKS.match(file.read(1000)) is not None
            if not ranks:
                size, ids, known = _sentencepiece(model)
                return _Tokens("tokenizer.model (sentencepiece)", size, {**ids, **declared}, {**known, **names})
            if not fast.is_file():
                with model.open("rb") as file:
                    return _Tokens("tokenizer.model (ranks, as Meta's)", sum(1 for _ in file), declared, names)
        if not fast.is_file():
            return _Tokens("none", None, declared, names)
        spec = _decoded(fast, _Fast)
        added = {token.content: token.id for token in spec.added_tokens}
        size = max([len(spec.model.vocab), *(i + 1 for i in added.values())])
        return _Tokens(f"tokenizer.json ({spec.model.type or 'no type'})", size, {**declared, **added}, names)

    def named(self) -> str:
        """bos, eos, unk and pad, each with its id where the files say it."""
        ids = {name: f" {self.ids[text]}" if text in self.ids else "" for name, text in self.names.items()}
        return ", ".join(f"{name.removesuffix('_token')} {text}{ids[name]}" for name, text in self.names.items())


class _FastModel(msgspec.Struct):
    vocab: dict[str, int] | list[Any] = msgspec.field(default_factory=dict)
    type: str | None = None


class _FastToken(msgspec.Struct):
    content: str
    id: int


class _Fast(msgspec.Struct):
    """What is read of a tokenizer.json."""

    model: _FastModel
    added_tokens: list[_FastToken] = msgspec.field(default_factory=list)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _sentencepiece(path: Path) -> tuple[int, dict[str, int], dict[str, str]]:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_proto=path.read_bytes())
        roles = {
            "bos_token": model.bos_id(),
            "eos_token": model.eos_id(),
            "unk_token": model.unk_id(),
            "pad_token": model.pad_id(),
        }
        names = {name: model.id_to_piece(i) for name, i in roles.items() if i >= 0}
        return model.vocab_size(), {text: roles[name] for name, text in names.items()}, names
    except (RuntimeError, ValueError, IndexError) as error:
        raise refused(f"inspect: {path} can't be read by sentencepiece ({error}), fetch the file again") from None


def _weight_names(folder: Path) -> tuple[list[str], list[str]]:
    if not (folder / INDEX).is_file():
        faults = [] if (folder / SINGLE).is_file() else [f"{folder} holds neither {SINGLE} nor {INDEX}"]
        return [] if faults else [SINGLE], faults
    names = sorted(set(_decoded(folder / INDEX, _Index).weight_map.values()))
    return [name for name in names if Path(name).name == name], [
        f"{folder / INDEX} points to {name!r}, expected a file in its own folder" for name in names if Path(name).name != name
    ]


def _entries(paths: Iterable[Path]) -> tuple[dict[str, Entry], list[str]]:
    """(tensors of all files by name, what is wrong with files)."""
    entries, faults = {}, []
    for path in paths:
        try:
            entries |= read_header(path)
        except FileNotFoundError:
            faults.append(f"{path} does not exist, expected it: the folder needs it; download it again")
        except (OSError, ValueError) as error:
            faults.append(f"{path} is no whole safetensors file ({error}); download it again")
    return entries, faults


def _n_parameters(name: str, entry: Entry, quantization: Mapping[str, Any]) -> int:
    """Of the model, where the tensor may be packed codes or what goes with them."""
    if BESIDE_CODES.fullmatch(name):
        return 0
    if PACKED_WORDS.fullmatch(name) and entry.dtype == "I32":
        return entry.numel * (32 // _bits(quantization))
    nibbles = entry.dtype == "U8" and (name.endswith("_blocks") or quantization.get("quant_method") == "bitsandbytes")
    return entry.numel * (2 if nibbles else 1)


def _bits(quantization: Mapping[str, Any]) -> int:
    groups = quantization.get("config_groups")
    found = [quantization.get("bits")]
    for group in groups.values() if isinstance(groups, dict) else []:
        weights = group.get("weights") if isinstance(group, dict) else None
        found.append(weights.get("num_bits") if isinstance(weights, dict) else None)
    return next((bits for bits in found if bits in (2, 3, 4, 8)), 4)


def _quantized(quantization: Any) -> str:
    if not isinstance(quantization, dict) or not quantization:
        return "no"
    words = [quantization.get(key) for key in ("quant_method", "scheme", "format", "fmt")]
    return f"{' '.join(str(word) for word in words if word) or 'yes'}, {_bits(quantization)} bits"


def _dtypes(entries: Mapping[str, Entry]) -> str:
    sizes: Counter[str] = Counter()
    for entry in entries.values():
        sizes[entry.dtype] += entry.end - entry.start
    return ", ".join(f"{dtype} {n_bytes_told(n)}" for dtype, n in sizes.most_common()) if set(sizes) <= set(BITS) else ""


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
    return ", ".join(dict.fromkeys(word.format(config[key]) for key, word in words if config.get(key)))


def _context(config: Mapping[str, Any]) -> str:
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    rope = rope if isinstance(rope, dict) else {}
    rope = next((value for value in rope.values() if isinstance(value, dict)), rope)  # nested by the kind of layer
    kind = rope.get("rope_type") or rope.get("type")
    words = [f"{_number(config.get('max_position_embeddings'))} tokens"]
    if kind not in (None, "default"):
        words.append(f"RoPE {kind} x {rope['factor']}" if rope.get("factor") else f"RoPE {kind}")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return ", ".join([*words, *([f"window {_number(window)}"] if window else [])])


def _stops(folder: Path, config: Mapping[str, Any], tokens: _Tokens) -> str:
    found = _object(folder / "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    texts = {i: text for text, i in tokens.ids.items()}
    return ", ".join(f"{texts.get(i, '')} {i}".strip() for i in _sequence(found) if isinstance(i, int))


def _template(folder: Path, tokens: _Tokens) -> str:
    if (folder / "chat_template.jinja").is_file():
        return "chat_template.jinja"
    if _object(folder / "tokenizer_config.json").get("chat_template"):
        return "tokenizer_config.json"
    return f"none; the built-in {'ChatML' if all(text in tokens.ids for text in CHATML) else 'plain'} one is used"


def _object(path: Path) -> dict[str, Any]:
    return _decoded(path, dict[str, Any]) if path.is_file() else {}


def _decoded(path: Path, kind: Any) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, ValueError, RecursionError) as error:
        raise refused(f"inspect: {path} can't be read ({error}), expected the JSON of its kind; fetch the file again") from None


def _sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _listed(value: Any) -> str:
    return ", ".join(str(one) for one in _sequence(value))


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "not said" if value is None else str(value)


def _count(n: int) -> str:
    short = next((f" ({n / size:.2f} {unit})" for size, unit in ((10**9, "billion"), (10**6, "million")) if n >= size), "")
    return f"{n:,}{short}"


def _printable(text: str) -> str:
    """What a file says can't move the cursor or colour the terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
