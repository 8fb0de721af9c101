"""A 125M Llama folder as transformers saves it, and docstring -> function pairs of the standard library, built and run here.

    python bench/docstrings.py FOLDER [lora|full] [KEY=VALUE ...]

Builds FOLDER once (about a minute: tokenizer of 32,000 pieces, model, two jsonl files), then runs bench/docstrings-lora.toml or
bench/docstrings-full.toml on it through the ordinary runner, and prints a row for RESULTS.md with the GEMM roof of this process.
Needs transformers, which the test extra brings.
"""

import ast
import io
import json
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from roof import gemm_flops_per_s

from minitune import models
from minitune.programs import program
from minitune.programs.run import run_program

HERE = Path(__file__).parent
SHAPE = models.open_config(HERE.parent / "configs/models/llama-125m.toml")
N_HELDOUT = 200


def functions() -> Iterator[tuple[str, str]]:
    """(docstring with signature, whole source) of every documented function of the standard library, each source once."""
    kept_sources = set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"site-packages", "test", "tests", "lib2to3"} & set(path.parts):
            continue
        try:
            text = path.read_text("utf-8")
            nodes = ast.walk(ast.parse(text))
        except (UnicodeDecodeError, SyntaxError):
            continue
        for node in nodes:
            if not isinstance(node, ast.FunctionDef) or not (doc := ast.get_docstring(node)):
                continue
            source = ast.get_source_segment(text, node) or ""
            if 80 <= len(source) <= 1500 and source not in kept_sources:
                kept_sources.add(source)
                yield f"def {node.name}({ast.unparse(node.args)}):\n{doc}", source


def build(folder: Path) -> None:
    """Write tokenizer, random model and data."""
    from sentencepiece import SentencePieceTrainer
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    pairs = list(functions())
    model_bytes = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(line for _, source in pairs for line in source.splitlines() if line),
        model_writer=model_bytes,
        model_type="bpe",
        vocab_size=SHAPE.config.vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        pad_id=3,
        user_defined_symbols=["<|im_start|>", "<|im_end|>", "\n"],
        minloglevel=2,
    )
    hf = {key: value for key, value in SHAPE.family.to_hf(SHAPE.config).items() if key != "architectures"}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**hf)).save_pretrained(folder / "model")
    (folder / "model/tokenizer.model").write_bytes(model_bytes.getvalue())
    special = {"4": "<|im_start|>", "5": "<|im_end|>"}
    added = {i: {"content": text, "special": True} for i, text in special.items()}
    config = json.dumps({"eos_token": "</s>", "added_tokens_decoder": added})
    (folder / "model/tokenizer_config.json").write_text(config, encoding="utf-8")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    for name, part in (("heldout", order[:N_HELDOUT]), ("train", order[N_HELDOUT:])):
        rows = ({"instruction": pairs[i][0], "output": pairs[i][1]} for i in part)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def floor_flops_per_token(kind: str, seq_len: int, target_share: float) -> float:
    """Matmul FLOPs a token that the step can't do without: LoRA 4N, full 6N, the head on labelled rows only, causal attention."""
    config = SHAPE.config
    n_head = config.vocab_size * config.d_model
    n_blocks = sum(torch.Size(s).numel() for s in SHAPE.shapes().values() if len(s) == 2) - 2 * n_head
    passes = 4 if kind == "lora" else 6
    return passes * (n_blocks + target_share * n_head) + 6 * config.n_layers * config.d_model * seq_len


def main() -> None:
    folder = Path(sys.argv[1])
    kind, overrides = (sys.argv[2:3] or ["lora"])[0], sys.argv[3:]
    if not (folder / "heldout.jsonl").is_file():
        build(folder)
    roofs = [gemm_flops_per_s(torch.float32)]
    words = [f"model.path={folder / 'model'}", f"out={folder / 'runs'}", "resume=false"]
    words += [f"data.{name}.path={folder / name}.jsonl" for name in ("train", "heldout")]
    loaded = program.load(HERE / f"docstrings-{kind}.toml", [*words, *overrides])
    summary = run_program(loaded)
    roofs.append(gemm_flops_per_s(torch.float32))
    report = summary["train"]["data"]
    target_share = report["n_target_tokens"] / report["n_tokens"]
    roof = max(best for _, best in roofs)
    share = summary["tokens_per_s"] * floor_flops_per_token(kind, loaded.data["train"].seq_len, target_share) / roof
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"commit {commit}, torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads")
    print("| program | samples | loss before -> after, nats | tokens/s | peak MiB | GEMM roof, GFLOP/s | share of roof |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {kind} | {report['n_samples']} | {summary['before']['loss_nats']:.3f} -> {summary['after']['loss_nats']:.3f} "
        f"| {summary['tokens_per_s']:.0f} | {summary['peak_mem_bytes'] / 2**20:.0f} | {roof / 1e9:.0f} | {share:.0%} |"
    )


if __name__ == "__main__":
    main()
