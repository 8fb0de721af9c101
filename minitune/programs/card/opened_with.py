"""Lines by which others open what a run has saved: those of them that hold for it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from minitune.errors import InputError
from minitune.io.graph_files import ONNX, PTE, graph_of
from minitune.io.json_file import read_json_object

ResultKind = Literal[
    "adapter",
    "model",
    "compressed-tensors",
    "bitsandbytes",
    "torchao",
    "gguf",
    "onnx",
    "executorch",
]
QUANTIZED: dict[str, ResultKind] = {
    "compressed-tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
}
MODEL, ADAPTER = "config.json", "adapter_config.json"
VLLM_RANK = 16  # of an adapter, that vLLM takes without being asked


def kind_of(place: Path) -> ResultKind:
    """ResultKind of what lies at a place; InputError for what no stage saves."""
    if place.suffix == ".gguf" and place.is_file():
        return "gguf"
    if (place / ADAPTER).is_file():
        return "adapter"
    if not (place / MODEL).is_file():
        found = "holds no config.json" if place.is_dir() else "is no folder"
        found = found if place.exists() else "does not exist"
        wanted = "expected a model folder, an adapter or a .gguf file"
        raise InputError(f"card: {place} {found}, {wanted}; correct the path")
    graph = graph_of(place)
    if graph is not None:
        return graph
    quantization = read_json_object(place / MODEL, "card").get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return QUANTIZED.get(str(method), "model")


def opened_with(kind: ResultKind, place: Path, repo: str, base: str | None) -> Iterator[str]:
    """Yield Markdown that says how to load a repository with what lies at a place.

    base: name of the base at the Hub, None where it has none that is known.
    """
    if kind == "adapter":
        yield from _adapter(read_json_object(place / ADAPTER, "card"), repo, base)
    elif kind == "gguf":
        yield from _block("llama.cpp", "bash", f"llama-cli -hf {repo} --hf-file {place.name}")
    elif kind == "onnx":
        imports = "import onnxruntime\nfrom huggingface_hub import snapshot_download"
        opening = f'onnxruntime.InferenceSession(snapshot_download("{repo}") + "/{ONNX}")'
        yield from _block("onnxruntime", "python", f"{imports}\n\nsession = {opening}")
    elif kind == "executorch":
        yield from _executorch(place, repo)
    else:
        yield from _model(kind, repo)


def _executorch(place: Path, repo: str) -> Iterator[str]:
    names = ("tokenizer.model", "tokenizer.json")
    tokenizer = next((name for name in names if (place / name).is_file()), names[0])
    yield from _block(
        "ExecuTorch",
        "python",
        "from executorch.extension.llm.runner import TextLLMRunner\n"
        "from huggingface_hub import snapshot_download\n\n"
        f'folder = snapshot_download("{repo}")\n'
        f'runner = TextLLMRunner(folder + "/{PTE}", folder + "/{tokenizer}")',
    )


def _model(kind: ResultKind, repo: str) -> Iterator[str]:
    packages = "" if kind == "model" else f" and `{kind}`"
    yield from _block(
        f"transformers{packages}",
        "python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{repo}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
    )
    if kind in ("model", "compressed-tensors"):
        yield from _block("vLLM", "bash", f"vllm serve {repo}")
    if kind == "model":
        convert = "python convert_hf_to_gguf.py FOLDER --outfile model.gguf"
        text = f"hf download {repo} --local-dir FOLDER\n{convert}\nllama-cli -m model.gguf"
        yield from _block("llama.cpp", "bash", text)
        yield from _minitune(repo, "model.path")


def _adapter(config: Mapping[str, Any], repo: str, base: str | None) -> Iterator[str]:
    name = base or "BASE"
    yield from _block(
        "PEFT",
        "python",
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'model = PeftModel.from_pretrained(base, "{repo}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
    )
    whole, dora = config.get("modules_to_save"), config.get("use_dora")
    if not whole and not dora:
        rank = max(
            [int(config.get("r", 0)), *map(int, (config.get("rank_pattern") or {}).values())]
        )
        more = f" --max-lora-rank {_vllm_rank(rank)}" if rank > VLLM_RANK else ""
        lora = f"--enable-lora --lora-modules mine={repo}{more}"
        yield from _block("vLLM", "bash", f"vllm serve {name} {lora}")
    yield from _minitune(repo, "model.deltas")


def _vllm_rank(rank: int) -> int:
    """Smallest bound on ranks that vLLM knows and that a rank keeps."""
    return next((bound for bound in (32, 64, 128, 256, 320, 512) if rank <= bound), rank)


def _minitune(repo: str, key: str) -> Iterator[str]:
    text = f"python -m minitune download {repo}\npython -m minitune chat models/{repo}"
    if key == "model.deltas":
        text = f"python -m minitune download {repo}"
        text += f"\npython -m minitune chat BASE_FOLDER --deltas models/{repo}"
    yield from _block("minitune", "bash", text)


def _block(title: str, language: str, text: str) -> Iterator[str]:
    yield f"### {title}\n```{language}\n{text}\n```"
