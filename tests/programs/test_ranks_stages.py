"""Stages on two ranks that share a model do what one process does: exports, the harness, and what quantizes or sweeps."""

import importlib.util
import json
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest
import torch
import yaml

from minitune.__main__ import main
from minitune.checkpoint import load_tensors
from support.program_ranks import run_on_ranks
from support.programs import STAGES_HEAD, rows_without_time
from support.ranks import Ranks

TRAINED = """
[[stage]]
op = "full"
[[stage]]
op = "train"
data = "train"
steps = 2
batch_size = 3
optimizer = { kind = "adamw", lr = 0.01 }
[[stage]]
op = "merge"
dtype = "float32"
[[stage]]
op = "save"
what = "params"
"""
HARNESS = """
[[stage]]
op = "harness"
tasks = ["scored", "answers"]
include = "tasks"
batch_size = 3
"""
INT8 = """
[[stage]]
op = "quantize"
scheme = { kind = "int8" }
"""
DATED = ("README.md", "verify.json")  # they hold times and paths


def is_absent(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def export(form: str, keys: str = "") -> str:
    return f'[[stage]]\nop = "export"\nname = "{form}"\nformat = "{form}"\n{keys}\n'


def program(name: str, tiny: Path, stages: str) -> str:
    """Path of a program in the working folder."""
    Path(f"{name}.toml").write_text(STAGES_HEAD.format(name=name, tiny=tiny) + stages, encoding="utf-8")
    return f"{name}.toml"


def on_ranks(ranks: Ranks, name: str, tiny: Path, stages: str, *words: str) -> None:
    run_on_ranks(ranks, 2, [program(name, tiny, stages), *words], Path.cwd())


def in_one(name: str, tiny: Path, stages: str, *words: str) -> None:
    assert main([program(name, tiny, stages), *words]) == 0


@pytest.fixture(scope="module")
def ones(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Function that has runs/one be a run of these stages in one process, which takes place once for all cases."""
    made: dict[tuple[str, ...], Path] = {}

    def one(stages: str, *words: str) -> None:
        folder = made.get((stages, *words))
        if folder is None:
            folder = made[stages, *words] = tmp_path_factory.mktemp("one")
            with chdir(folder):
                in_one("one", tiny, stages, *words)
        Path("runs").mkdir()
        Path("runs/one").symlink_to(folder / "runs/one")

    return one


def record_of(name: str, label: str) -> dict:
    return json.loads(Path(f"runs/{name}/records.json").read_text("utf-8"))[label]


def assert_close_rows(rows: list[dict], others: list[dict], rel: float) -> None:
    """Rows of two runs are equal but for the rounding of sums."""
    assert len(rows) == len(others) >= 3
    for row, other in zip(rows, others, strict=True):
        assert row.pop("stage") == other.pop("stage")
        assert row == pytest.approx(other, rel=rel, abs=1e-6)


def write_tasks() -> None:
    """Two tasks of the harness, scored and generated, whose rows that do not fill their last batch."""
    Path("tasks").mkdir()
    texts = ("Nine lamps went to Oslo.", "Three globes to Salzburg.", "A grey Monday.", "Seven maps to Turin in May.")
    rows = [{"q": text, "choices": ["Oslo", "Turin", "May"], "gold": i % 3} for i, text in enumerate(texts)]
    Path("tasks/rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(Path("tasks/rows.jsonl").absolute())}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    scored = {
        "output_type": "loglikelihood",
        "doc_to_target": " {{choices[gold]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    asked = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task, keys in (("scored", scored), ("answers", asked)):
        Path(f"tasks/{task}.yaml").write_text(yaml.safe_dump({"task": task, **common, **keys}), encoding="utf-8")


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents of the files of a result; a file is one by itself."""
    if folder.is_file():
        return {folder.name: folder.read_bytes()}
    files = [path for path in folder.iterdir() if not path.name.startswith(".") and path.name not in DATED]
    return {path.name: path.read_bytes() for path in files}


def assert_same_files(*names: str) -> None:
    """What two runs have left under these names is equal to the byte."""
    for name in names:
        one, two = (files_of(Path("runs", run, name)) for run in ("one", "two"))
        assert one.keys() == two.keys()
        for file, content in one.items():
            assert content == two[file], f"{name}/{file}"


@pytest.mark.parametrize(
    "form",
    [
        "gguf",
        pytest.param(
            "onnx",
            marks=[
                pytest.mark.soak,
                pytest.mark.reference,
                pytest.mark.skipif(is_absent("onnx"), reason="onnx is not installed"),
            ],
        ),
        pytest.param(
            "executorch",
            marks=[
                pytest.mark.soak,
                pytest.mark.reference,
                pytest.mark.skipif(is_absent("executorch"), reason="executorch is not installed"),
            ],
        ),
    ],
)
def test_exports_after_training_on_two_ranks(
    form: str, ranks: Ranks, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    """One process loads what the ranks have saved, and does the same from there on: every byte of every file is equal.

    All formats are given whole weights in the same way, so that the one that is written at once stands for the slow ones.

    The merge after full training is exact: in float32 it hands on what was trained.
    """
    monkeypatch.chdir(tmp_path)
    after = export(form, {"executorch": "max_context_len = 64", "gguf": 'types = { default = "Q8_0" }'}.get(form, ""))
    names, how = ["model.gguf" if form == "gguf" else form], ("plan=fsdp",)
    if form == "gguf":
        write_tasks()
        after = HARNESS + after + INT8 + export("torchao", 'activations = "int8"') + export("compressed-tensors")
        names += ["torchao", "compressed-tensors"]
    if form == "onnx":
        # ranks that share rows, of which the first one alone runs the model that the file is held against
        after, how = after + '[[stage]]\nop = "verify"\n', ("plan=cp", "mesh={data=1,context=2}")
    on_ranks(ranks, "two", tiny, TRAINED + after, *how)
    in_one("one", tiny, after, "model.path=runs/two/params")
    assert_same_files(*names)
    for label in {"gguf": ["harness"], "onnx": ["verify"]}.get(form, []):
        one, two = (record_of(run, label) for run in ("one", "two"))
        varies = ("time_s", "artefact")  # the path is that of the run
        assert {**one, **dict.fromkeys(varies)} == {**two, **dict.fromkeys(varies)}


# rows of 256, which the K types of GGUF need
SHAPE = """
family = "llama"
n_layers = 2
n_heads = 4
n_kv_heads = 2
d_model = 256
d_head = 64
d_ff = 256
vocab_size = 1024
tie_embeddings = true
"""
CALIBRATED = """
[[stage]]
op = "export"
name = "unweighed"
format = "gguf"
path = "run/unweighed.gguf"
types = { default = "Q4_K" }
[[stage]]
op = "export"
name = "weighed"
format = "gguf"
types = { default = "Q4_K" }
importance = { data = "train", rows = 5 }
[[stage]]
op = "quantize"
name = "gptq"
scheme = { kind = "int4", group = 32 }
method = { kind = "gptq", data = "train", rows = 5 }
[[stage]]
op = "export"
format = "compressed-tensors"
"""


@pytest.mark.parametrize("how", [("plan=fsdp",), ("plan=cp", "mesh={data=1,context=2}")], ids=str)
def test_calibration_of_weights_in_parts_gives_the_codes_of_one_process(
    how: tuple[str, ...], ranks: Ranks, ones: Callable[..., None], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every rank calibrates on all rows, a block at a time: codes, scales and files are equal to the byte."""
    monkeypatch.chdir(tmp_path)
    shape = tmp_path.parent / "shape-to-calibrate.toml"  # one path in all cases, which share the run of one process
    shape.write_text(SHAPE, encoding="utf-8")
    model = f'model={{ config = "{shape}", tokenizer = "demo", dtype = "float32" }}'
    ones(CALIBRATED, model)
    on_ranks(ranks, "two", tiny, CALIBRATED, model, *how)
    assert_same_files("model.gguf", "compressed-tensors", "checkpoints/gptq")
    assert Path("runs/one/model.gguf").read_bytes() != Path("runs/one/unweighed.gguf").read_bytes()


AWARE = """
[[stage]]
op = "full"
[[stage]]
op = "qat"
scheme = { kind = "int8" }
[[stage]]
op = "train"
data = "train"
steps = 3
batch_size = 3
micro_batch_size = 1
optimizer = { kind = "adamw", lr = 0.01 }
evaluate = { data = "heldout", every = 2, batch_size = 8 }
[[stage]]
op = "eval"
data = "heldout"
limit = 2
max_new_tokens = 2
[[stage]]
op = "merge"
dtype = "float32"
[[stage]]
op = "save"
what = "params"
"""
SWEPT = """
[[stage]]
op = "lora"
rank = 2
alpha = 4.0
targets = ["*_proj.weight"]
dropout = 0.25
[[stage]]
op = "train"
data = "train"
steps = 3
batch_size = 5
micro_batch_size = 2
save_every = 2
optimizer = { kind = "adamw", lr = 0.01 }
evaluate = { data = "heldout", every = 2, batch_size = 8 }
sweep = { "optimizer.lr" = [0.01, 0.02], "lora.rank" = [2, 3] }
[[stage]]
op = "save"
what = "merged"
dtype = "float32"
"""


@pytest.mark.parametrize("how", [("plan=fsdp",), ("plan=cp", "mesh={data=1,context=2}")], ids=str)
@pytest.mark.parametrize(("stages", "saved"), [(AWARE, "params"), (SWEPT, "merged")], ids=["qat", "sweep"])
def test_training_that_looks_at_whole_weights_is_that_of_one_process(
    stages: str,
    saved: str,
    how: tuple[str, ...],
    ranks: Ranks,
    ones: Callable[..., None],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Rows of the log, and the model that is saved, up to the rounding of sums."""
    monkeypatch.chdir(tmp_path)
    ones(stages)
    on_ranks(ranks, "two", tiny, stages, *how)
    rows, others = rows_without_time(Path("runs/one")), rows_without_time(Path("runs/two"))
    assert_close_rows(rows, others, rel=2e-4)
    one, two = (load_tensors(Path("runs", run, saved, "model.safetensors")) for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name, w in one.items():
        torch.testing.assert_close(two[name], w, rtol=1e-3, atol=1e-4)


def demo_words(tiny: Path) -> list[str]:
    """Words that run the demo in float32, on few rows."""
    words = ["lora", "train.steps=3", "train.batch_size=2", "model.dtype=float32"]
    words += [f"data.{part}.path={tiny / f'orders-{part}.jsonl'}" for part in ("train", "heldout")]
    return words + [f"{label}.{key}" for label in ("before", "after") for key in ("limit=2", "max_new_tokens=3")]


@pytest.fixture(scope="module")
def demo_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run that one process makes of the demo."""
    out = tmp_path_factory.mktemp("demo")
    assert main([*demo_words(tiny), f"out={out}"]) == 0
    return out / "lora"


@pytest.mark.parametrize("shared", [("mesh={context=2}",), ("plan=tp_fsdp", "mesh={data=1,tensor=3}")], ids=["context", "tensor"])
def test_the_commands_of_the_page_take_the_steps_of_one_process(
    shared: tuple[str, ...], ranks: Ranks, demo_run: Path, tmp_path: Path, tiny: Path
):
    """The demo on ranks that share tokens, or linear maps: what docs/sharding.md starts, in float32 and on fewer rows."""
    run_on_ranks(ranks, 3 if len(shared) > 1 else 2, [*demo_words(tiny), f"out={tmp_path}", *shared], tmp_path)
    runs = demo_run, tmp_path / "lora"
    assert_close_rows(*(rows_without_time(run) for run in runs), rel=1e-4)
    for label in ("before", "after"):
        one, two = (json.loads((run / "records.json").read_text("utf-8"))[label] for run in runs)
        assert one["loss_nats"] == pytest.approx(two["loss_nats"], rel=1e-5)
        assert one["n_prompts"] == two["n_prompts"] == 2
