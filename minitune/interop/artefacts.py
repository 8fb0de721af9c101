"""Formats of what minitune writes, told from its files: the packages that open each, and how far
its logits may be from ours.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minitune.errors import InputError
from minitune.interop.readers import executorch, hugging_face, onnxruntime
from minitune.interop.readers.reader import Reader, is_installed
from minitune.io.graph_files import ONNX, PTE, graph_of
from minitune.io.json_file import read_json_object

Quantized = Literal["compressed-tensors", "bitsandbytes", "torchao"]  # folders
FormatName = Literal["adapter", "folder", "gguf", "onnx", "executorch"] | Quantized
ADAPTER_CONFIG, CONFIG = "adapter_config.json", "config.json"
# Largest errors of logits, as shares of the largest logit: of float32 sums in another order, of
# numbers in 16 bits, of numbers or activations in 8, of weights in fewer.
SUMS, IN_16_BITS, IN_8_BITS, IN_4_BITS = 1e-4, 2e-2, 1e-1, 5e-1


class Format(NamedTuple):
    """Way to write a model."""

    packages: tuple[str, ...]  # that read it
    extra: str  # that installs them
    is_read: bool  # minitune itself reads it


FORMATS: dict[FormatName, Format] = {
    "adapter": Format(("transformers", "peft"), "verify", True),
    "folder": Format(("transformers",), "verify", True),
    "compressed-tensors": Format(("transformers", "compressed_tensors"), "verify", True),
    "bitsandbytes": Format(("transformers", "bitsandbytes"), "verify", True),
    "torchao": Format(("transformers", "torchao"), "torchao", True),
    "gguf": Format(("transformers", "gguf"), "verify", False),
    "onnx": Format(("onnxruntime",), "onnx", False),
    "executorch": Format(("executorch",), "executorch", False),
}

# format by what a save stage wrote
OF_SAVES: dict[str, FormatName] = {"deltas": "adapter", "merged": "folder", "params": "folder"}


def format_written(what: str) -> FormatName:
    """Format of what a save or export stage wrote, by its word for it."""
    names: list[FormatName] = [name for name in FORMATS if name == what]
    return names[0] if names else OF_SAVES[what]


def format_of(path: Path) -> FormatName:
    """Format of a folder or a file; InputError for what is none that is known."""
    if path.suffix == ".gguf" and path.is_file():
        return "gguf"
    if path.name == ONNX:
        return "onnx"
    if path.suffix == ".pte" and path.is_file():
        return "executorch"
    graph = graph_of(path)
    if graph is not None:
        return graph
    if (path / ADAPTER_CONFIG).is_file():
        return "adapter"
    if (path / CONFIG).is_file():
        method = _quantization(path).get("quant_method")
        names: list[FormatName] = [name for name in FORMATS if name == method]
        return names[0] if names else "folder"
    raise InputError(
        f"verify: {path} holds no {CONFIG}, {ADAPTER_CONFIG}, {ONNX} or {PTE}, and is no .gguf "
        "or .pte file, expected what a save or export stage wrote; correct the path"
    )


def require_reader(name: FormatName) -> None:
    """InputError if a package that opens a format is not installed."""
    for package in FORMATS[name].packages:
        if not is_installed(package):
            raise InputError(
                f"verify: the package {package} is not installed, expected it to open {name}; "
                f"pip install 'minitune[{FORMATS[name].extra}]'"
            )


def open_reader(path: Path, name: FormatName, base: Path | None) -> Reader:
    """Model that was written, as another program runs it; base: the folder below an adapter."""
    if name == "gguf":
        return hugging_face.open_gguf(path)
    if name == "onnx":
        return onnxruntime.open_onnx(_file_of(path, ONNX))
    if name == "executorch":
        return executorch.open_executorch(_file_of(path, PTE))
    if name == "adapter":
        assert base is not None, "an adapter is opened on its base"
        return hugging_face.open_adapter(path, base)
    return hugging_face.open_folder(path, FORMATS[name].packages)


def bound(path: Path, name: FormatName, *, same_weights: bool) -> float:
    """Largest error that the logits of an artefact may have.

    same_weights: it is held against the numbers that it stores, and not against what they were
    rounded from.
    """
    if name == "onnx":
        return _bound_of_onnx(path)
    if name == "gguf":
        return _bound_of_bits(_bits_of_gguf(path))
    if name == "executorch":
        bits = executorch.weight_bits(_file_of(path, PTE))
        # activations that meet codes are rounded to 8 bits
        return _bound_of_bits(max(bits, 8) if same_weights else bits)
    if name == "adapter":
        return SUMS
    rules = list(_rules(_quantization(path)))
    torchao = str(_quantization(path).get("quant_type", ""))
    rounds_activations = "DynamicActivation" in torchao or any(
        rule.get("input_activations") for rule in rules
    )
    if same_weights and not rounds_activations:
        # minitune reads codes as the bfloat16 that they stand for
        return IN_16_BITS if _quantization(path) else SUMS
    if same_weights:
        return IN_8_BITS
    config = read_json_object(path / CONFIG, "verify")
    if name == "folder":
        return SUMS if config.get("dtype", config.get("torch_dtype")) == "float32" else IN_16_BITS
    if name == "torchao":
        return _bound_of_bits(4 if "Intx" in torchao else 8)
    bits = [int(rule["weights"]["num_bits"]) for rule in rules if rule.get("weights")]
    return _bound_of_bits(min(bits, default=4))


def _file_of(path: Path, name: str) -> Path:
    """File of a graph: the path itself, or the file of that name in the folder."""
    return path if path.is_file() else path / name


def _quantization(folder: Path) -> Mapping[str, Any]:
    """Rule by which a folder's weights are quantized, as config.json has it; {} for none."""
    return read_json_object(folder / CONFIG, "verify").get("quantization_config") or {}


def _rules(quantization: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the rules of groups of weights that compressed-tensors has."""
    yield from (quantization.get("config_groups") or {}).values()


def _bound_of_bits(bits: int) -> float:
    for least, share in ((32, SUMS), (16, IN_16_BITS), (8, IN_8_BITS)):
        if bits >= least:
            return share
    return IN_4_BITS


def _bits_of_gguf(file: Path) -> int:
    """Bits of a number of the most rounded matrix of a file."""
    import gguf

    tensors = gguf.GGUFReader(str(file)).tensors
    sizes = [gguf.GGML_QUANT_SIZES[tensor.tensor_type] for tensor in tensors]
    return min(8 * n_bytes // n_weights for n_weights, n_bytes in sizes)


def _bound_of_onnx(path: Path) -> float:
    import onnx

    graph = onnx.load(str(_file_of(path, ONNX)), load_external_data=False).graph
    is_float32 = graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    return SUMS if is_float32 else IN_16_BITS
