"""Facts of a model or adapter folder, from its JSON files and headers; no weights are read."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from minitune.errors import InputError
from minitune.io.json_file import read_json, read_json_object
from minitune.io.safetensors_header import INDEX, SINGLE, Entry, read_header, read_weight_map
from minitune.text.ranks import holds_ranks
from minitune.text.vocabulary import NAMED_TOKENS

ADAPTER_CONFIG, ADAPTER, ORIGIN = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "minitune.json",
)
REMEDY = "fetch the file again"
# what quantized formats keep beside the codes of a weight: no parameters of the model
QUANT_METADATA = re.compile(
    r".*(\.(weight_(scale|shape|zero_point|g_idx|scale_inv|global_scale)|(input|output)_(global_)?scale|(nested_)?(absmax|quant_map)|scales|qzeros|g_idx)"
    r"|\.quant_state\..*|_scales|rotary_emb\.inv_freq)"
)
PACKED_WORDS = re.compile(r".*\.(weight_packed|qweight)")


class TokenizerFiles(NamedTuple):
    """Content of tokenizer files: the kind, how many tokens, and the added ones with their ids."""

    kind: str
    size: int | None
    ids: Mapping[str, int]
    names: Mapping[str, str]

    @staticmethod
    def of(folder: Path) -> "TokenizerFiles":
        """Content of a folder's tokenizer files; InputError for one that can't be read."""
        model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
        config = read_json_object(
            folder / "special_tokens_map.json", "inspect", optional=True
        ) | read_json_object(folder / "tokenizer_config.json", "inspect", optional=True)
        decoder = config.get("added_tokens_decoder")
        declared = {}
        for i, token in (decoder if isinstance(decoder, dict) else {}).items():
            if i.isdecimal() and isinstance(token, dict):
                declared[str(token.get("content"))] = int(i)
        marked = {name: config[name] for name in NAMED_TOKENS if config.get(name)}
        names = {
            name: str(token.get("content") if isinstance(token, dict) else token)
            for name, token in marked.items()
        }
        if model.is_file():
            if not holds_ranks(model):
                size, ids, known = _sentencepiece(model)
                return TokenizerFiles(
                    "tokenizer.model (sentencepiece)", size, {**ids, **declared}, {**known, **names}
                )
            if not fast.is_file():
                with model.open("rb") as file:
                    return TokenizerFiles(
                        "tokenizer.model (ranks, as Meta's)", sum(1 for _ in file), declared, names
                    )
        if not fast.is_file():
            return TokenizerFiles("none", None, declared, names)
        spec = read_json(fast, _Fast, "inspect", REMEDY)
        added = {token.content: token.id for token in spec.added_tokens}
        size = max([len(spec.model.vocab), *(i + 1 for i in added.values())])
        return TokenizerFiles(
            f"tokenizer.json ({spec.model.type or 'no type'})", size, {**declared, **added}, names
        )

    def named(self) -> str:
        """Tokens by role, such as bos and eos, each with its id where the files say it."""
        ids = {
            name: f" {self.ids[text]}" if text in self.ids else ""
            for name, text in self.names.items()
        }
        return ", ".join(
            f"{name.removesuffix('_token')} {text}{ids[name]}" for name, text in self.names.items()
        )


class _FastModel(msgspec.Struct):
    vocab: dict[str, int] | list[Any] = msgspec.field(default_factory=dict)
    type: str | None = None


class _FastToken(msgspec.Struct):
    content: str
    id: int


class _Fast(msgspec.Struct):
    """Part of a tokenizer.json that is read."""

    model: _FastModel
    added_tokens: list[_FastToken] = msgspec.field(default_factory=list)


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
        raise InputError(
            f"inspect: {path} can't be read by sentencepiece ({error}), fetch the file again"
        ) from None


def weight_files(folder: Path) -> tuple[list[str], list[str]]:
    """(names of the files that hold a folder's weights, what is wrong with them)."""
    if not (folder / INDEX).is_file():
        faults = (
            [] if (folder / SINGLE).is_file() else [f"{folder} holds neither {SINGLE} nor {INDEX}"]
        )
        return [] if faults else [SINGLE], faults
    names = sorted(set(read_weight_map(folder, "inspect", REMEDY).values()))
    return [name for name in names if Path(name).name == name], [
        f"{folder / INDEX} points to {name!r}, expected a file in its own folder"
        for name in names
        if Path(name).name != name
    ]


def tensor_entries(paths: Iterable[Path]) -> tuple[dict[str, Entry], list[str]]:
    """(tensors of all files by name, what is wrong with files)."""
    entries, faults = {}, []
    for path in paths:
        try:
            entries |= read_header(path)
        except FileNotFoundError:
            faults.append(
                f"{path} does not exist, expected it: the folder needs it; download it again"
            )
        except (OSError, ValueError) as error:
            faults.append(f"{path} is no whole safetensors file ({error}); download it again")
    return entries, faults


def n_parameters(name: str, entry: Entry, quantization: Mapping[str, Any]) -> int:
    """Of the model, where the tensor may be packed codes or what goes with them."""
    if QUANT_METADATA.fullmatch(name):
        return 0
    if PACKED_WORDS.fullmatch(name) and entry.dtype == "I32":
        return entry.numel * (32 // bits_of(quantization))
    nibbles = entry.dtype == "U8" and (
        name.endswith(("_blocks", ".weight_packed"))
        or quantization.get("quant_method") == "bitsandbytes"
    )
    return entry.numel * (2 if nibbles else 1)


def bits_of(quantization: Mapping[str, Any]) -> int:
    """Bits of a quantized weight as a quantization_config says them, wherever its format has them;
    4 if it does not.
    """
    groups = quantization.get("config_groups")
    candidates = [quantization.get("bits")]
    for group in groups.values() if isinstance(groups, dict) else []:
        weights = group.get("weights") if isinstance(group, dict) else None
        candidates.append(weights.get("num_bits") if isinstance(weights, dict) else None)
    return next((bits for bits in candidates if bits in (2, 3, 4, 8)), 4)
