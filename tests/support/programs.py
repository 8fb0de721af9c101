"""Programs at toy size: a tiny model with its data, overrides, stages to put together, and runs in a process of their own."""

import json
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import torch

from minitune import checkpoint
from minitune.__main__ import main
from minitune.io import paths
from minitune.io.toml_messages import types_at
from minitune.models import Model
from minitune.models.families import llama
from minitune.programs import program
from minitune.programs.stages import training_loop
from minitune.programs.stages.loop_state import LoopState
from minitune.programs.stages.stage import Stage
from support.forked import Program
from support.models import random_params
from support.numbers import Power

TINY = llama.Config(n_layers=2, n_heads=2, n_kv_heads=1, d_model=32, d_head=16, d_ff=64, vocab_size=1024, tie_embeddings=True)
# Programs that run on the demo: recipes are for real models, and have tests of their own.
SHIPPED = {name: file for name, file in paths.shipped().items() if not name.startswith("recipes/")}
OPS = {stage.__struct_config__.tag for stage in Stage.__args__}


def write_tiny(folder: Path) -> None:
    """Fill a folder with a tiny random model and the demo's tokenizer, one of a single layer, and a few rows of the demo's data
    and of prose.
    """
    demo = paths.locate("demo")
    for name, config in (("model", TINY), ("one-layer", msgspec.structs.replace(TINY, n_layers=1))):
        params = {name: 0.1 * w for name, w in random_params(config).items()}
        checkpoint.save_folder(folder / name, params, Model(llama.FAMILY, config), checkpoint.FolderExtras(demo, []))
    for name in ("orders-train", "orders-heldout", "orders-pairs"):
        rows = paths.locate(f"demo/{name}.jsonl").read_text(encoding="utf-8").splitlines()[:40]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "text.jsonl").write_text('{"text": "Nine lamps went to Oslo on a grey Monday."}\n' * 9, encoding="utf-8")
    shape = "family = 'llama'\n" + "\n".join(
        f"{f} = {json.dumps(getattr(TINY, f))}" for f in ("n_layers", "n_heads", "n_kv_heads")
    )
    rest = "\n".join(
        f"{f} = {json.dumps(getattr(TINY, f))}" for f in ("d_model", "d_head", "d_ff", "vocab_size", "tie_embeddings")
    )
    (folder / "shape.toml").write_text(f"{shape}\n{rest}\n", encoding="utf-8")


def toy(name: str, tiny: Path, out: Path, steps: int = 3) -> list[str]:
    """Overrides that make a shipped program small."""
    loaded = program.load(SHIPPED[name])
    words = [f"out={out}"]
    words += [f"model.path={tiny / 'model'}"] if loaded.model.path else [f"model.config={tiny / 'shape.toml'}"]
    for key, source in loaded.data.items():
        if source.split is not None and source.split.part == "heldout":
            words.append("data.train.holdout=0.3")
            continue
        words.append(f"data.{key}.path={tiny / ('text' if source.format == 'text' else Path(source.path).stem)}.jsonl")
    return words + small_stages(loaded, tiny, steps)


def small_stages(loaded: program.Program, tiny: Path, steps: int = 3) -> list[str]:
    """Overrides that make the stages of a program small."""
    words = []
    steps = max(steps, loaded.profile.steps[1]) if loaded.profile is not None else steps
    for stage in loaded.stage:
        label, fields = stage.label, stage.__struct_fields__
        if "steps" in fields:
            words += [f"{label}.steps={steps}", f"{label}.batch_size=4", f"{label}.save_every=2"]
            words += [f"{label}.evaluate.every=2", f"{label}.evaluate.batch_size=16"] if stage.evaluate else []
        if "limit" in fields:
            words.append(f"{label}.limit=5")
        if "max_new_tokens" in fields:
            words.append(f"{label}.max_new_tokens=4")
        if "model" in fields and not stage.model.path.startswith("run/"):
            words.append(f"{label}.model.path={tiny / 'model'}")
        if "method" in fields and hasattr(stage.method, "rows"):
            words.append(f"{label}.method.rows=4")
    return words


def fields_beside(key: str) -> list[str]:
    """Names of the keys that stand beside a key of the table, such as train.optimizer.lr, in whatever struct can hold it."""
    head, *rest = key.split(".")
    path: tuple[str | int, ...] = (head, *rest)
    raw: dict = {}
    if head in OPS:
        path, raw = ("stage", 0, *rest), {"stage": [{"op": head}]}
    kinds = types_at(program.Program, raw, path[:-1])
    return [field.encode_name for kind in kinds if isinstance(kind, msgspec.inspect.StructType) for field in kind.fields]


COMMAND = [sys.executable, "-m", "minitune"]


def spawn(words: list[str], **options: object) -> subprocess.Popen:
    return subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen | Program, stage: str = "train") -> None:
    """Wait until that step of a stage is in metrics.jsonl; a process that hangs runs into the limit that guards every test."""
    while True:
        if process.poll() is not None:
            raise AssertionError(f"ended early with {process.returncode}: {process.communicate()}")
        path = folder / "metrics.jsonl"
        if path.exists() and f'"stage": "{stage}", "step": {step},' in path.read_text(encoding="utf-8"):
            return
        time.sleep(0.002)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_tensors(checkpoint.list_states(folder / "checkpoints/train")[-1] / "state.safetensors")


def rows_without_time(folder: Path) -> list[dict]:
    # current_epoch: rows of the first release have none
    timed = ("tokens_per_second", "mem_bytes", "current_epoch")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def run_killed(
    tmp_path: Path,
    tiny: Path,
    stages: str,
    *words: str,
    after_step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run a program called killed whose training dies after a step, and then to its end."""
    queue_step = training_loop._queue_step

    def dying(task: object, train_state: object, loop: LoopState) -> object:
        if loop.step == after_step:
            raise Power
        return queue_step(task, train_state, loop)

    with monkeypatch.context() as patch:
        patch.setattr(training_loop, "_queue_step", dying)
        with pytest.raises(Power):
            start(tmp_path, tiny, stages, *words, name="killed")
    run(tmp_path, tiny, stages, *words, name="killed")


STAGES_HEAD = """
name = "{name}"
[model]
path = "{tiny}/model"
dtype = "float32"
[data.train]
path = "{tiny}/orders-train.jsonl"
format = "instruct"
seq_len = 256
[data.heldout]
path = "{tiny}/orders-heldout.jsonl"
format = "instruct"
seq_len = 256
[data.pairs]
path = "{tiny}/orders-pairs.jsonl"
format = "pairs"
seq_len = 256
[data.unpaired]
path = "{tiny}/orders-pairs.jsonl"
format = "unpaired"
seq_len = 256
"""
ONE_STEP = """\
[[stage]]
op = "train"
data = "train"
steps = 1
batch_size = 2
optimizer = { kind = "adamw", lr = 5e-3 }
"""


def small_program(model: str = "demo", data: str = "demo/orders-train.jsonl") -> str:
    """A program that puts deltas on a model and trains nothing yet."""
    head = f'name = "t"\n[model]\npath = "{model}"\ndtype = "float32"\n'
    source = f'[data.train]\npath = "{data}"\nformat = "instruct"\nseq_len = 160\n'
    return f'{head}{source}[[stage]]\nop = "lora"\nrank = 4\nalpha = 8.0\ntargets = ["*.self_attn.*_proj.weight"]\n'


# of a program whose model is a shape: what a plan needs
SHAPE_HEAD = """name = "p"
[model]
config = "{model}"
tokenizer = "demo"
dtype = "bfloat16"
[data.train]
path = "demo/orders-train.jsonl"
format = "instruct"
seq_len = 512
"""
LORA = '[[stage]]\nop = "lora"\nrank = 2\nalpha = 4.0\ntargets = ["*_proj.weight"]\n'
NF4 = '[[stage]]\nop = "quantize"\nscheme = { kind = "nf4" }\n'
TRAIN = '[[stage]]\nop = "train"\ndata = "train"\nsteps = 4\nbatch_size = 4\nsave_every = 2\n'
TRAIN += 'optimizer = { kind = "adamw", lr = 0.05 }\n'


def evaluation(name: str) -> str:
    return f'[[stage]]\nop = "eval"\nname = "{name}"\ndata = "heldout"\nlimit = 2\nmax_new_tokens = 2\n'


def run(tmp_path: Path, tiny: Path, stages: str, *words: str, name: str = "p") -> dict:
    """The summary of a program made of these stages."""
    assert start(tmp_path, tiny, stages, *words, name=name) == 0
    return json.loads((tmp_path / name / "summary.json").read_text(encoding="utf-8"))


def start(tmp_path: Path, tiny: Path, stages: str, *words: str, name: str = "p", verb: tuple[str, ...] = ()) -> int:
    (tmp_path / f"{name}.toml").write_text(STAGES_HEAD.format(name=name, tiny=tiny) + stages, encoding="utf-8")
    return main([*verb, str(tmp_path / f"{name}.toml"), f"out={tmp_path}", *words])
