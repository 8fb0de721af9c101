"""Folders as a whole: complete when written, and whatever is wrong with what is read is one clear error."""

import io
import json
import os
import random
import shutil
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
import torch
from pyarrow import parquet
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitune import checkpoint, host, models
from minitune.checkpoint.fingerprint import folder_fingerprint
from minitune.cli.inspect import summarize
from minitune.data import readers
from minitune.data.prompts import prompts
from minitune.data.source import Source
from minitune.errors import InputError
from minitune.interop.peft.layout import Base
from minitune.interop.peft.load import load_adapter
from minitune.interop.peft.save import save_adapter
from minitune.io import array_cache, paths
from minitune.io.json_file import read_json
from minitune.io.results import require_unharmed, result_folder
from minitune.lora import Lora, check_deltas
from minitune.models import Model
from minitune.models.families import llama
from minitune.programs import program, records
from minitune.programs.log import Log, LogConfig
from minitune.programs.manifest import Manifest, Start
from minitune.programs.records import write_record
from minitune.programs.report import report
from minitune.text import tokenizer
from minitune.text.chat import encode_chat, encode_prompt, open_template
from minitune.text.served import stop_ids
from minitune.text.template import render
from support.models import SMALL, random_params
from support.programs import ONE_STEP, small_program

MODEL = Model(llama.FAMILY, SMALL)
DEMO = paths.PACKAGE / "demo/model"
DEMO_TEXT = tokenizer.open_tokenizer(DEMO)
DEMO_TEMPLATE = open_template(DEMO, DEMO_TEXT)
N_MUTATIONS = 2_000  # in all; the soak runs N_SOAK
N_SOAK = int(os.environ.get("MINITUNE_SOAK_MUTATIONS", "100000"))
TEMPLATE = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def byte_level(folder: Path) -> None:
    """A tokenizer of all bytes and ChatML's tokens, with its config."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    fast = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    fast.decoder = tokenizers.decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    fast.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE, "added_tokens_decoder": {"257": {"content": "<|im_end|>"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("shard_bytes", [10**9, 10**6])
def test_a_folder_that_passed_through_is_whole_for_transformers(shard_bytes: int, tmp_path: Path) -> None:
    """config.json with its unknown keys, weights, stop tokens, tokenizer and template, all as they were but what was trained."""
    source = Path(shutil.copytree(DEMO, tmp_path / "source"))
    config = {
        **json.loads((DEMO / "config.json").read_text(encoding="utf-8")),
        "somebody": {"else": ["reads", 1e-7]},
        "\u00fc": None,
    }
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = models.open(DEMO)
    params = {name: w.float() * 1.01 for name, w in checkpoint.load_params(DEMO, model.shapes()).items()}
    checkpoint.save_folder(
        tmp_path / "out",
        params,
        model,
        checkpoint.FolderExtras(DEMO, stop_ids(DEMO_TEXT, DEMO_TEMPLATE), source=source),
        shard_bytes=shard_bytes,
    )
    out = tmp_path / "out"
    assert json.loads((out / "config.json").read_text(encoding="utf-8")) == {
        **config,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    assert len(list(out.glob("*.safetensors"))) == (1 if shard_bytes > 10**6 else 9)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (DEMO / name).read_bytes()
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in out.iterdir())  # others may read it, as with any file

    hf, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    turns = [{"role": "user", "content": "I want two maps."}]
    theirs = AutoTokenizer.from_pretrained(out)
    asked = theirs.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert asked == render(DEMO_TEMPLATE, turns, add_generation_prompt=True)
    tokens = torch.tensor([encode_prompt(DEMO_TEXT, DEMO_TEMPLATE, turns)])
    with torch.no_grad():
        torch.testing.assert_close(model.forward(params, tokens), hf.eval()(tokens).logits, rtol=0, atol=1e-4)
    assert set(stop_ids(DEMO_TEXT, DEMO_TEMPLATE)) <= set(hf.generation_config.eos_token_id)
    rows, faults = summarize(out)
    assert (faults, rows["parameters"], rows["dtypes"]) == ([], "1,820,352 (1.82 million)", "F32 6.9 MiB")


def read_model(folder: Path) -> None:
    model = models.open(folder)
    if model.config.n_layers <= 100:  # a config may promise any number of layers, whose names alone fill the memory
        checkpoint.load_params(folder, model.shapes())
    folder_fingerprint(folder)


def read_text(folder: Path) -> None:
    text = tokenizer.open_tokenizer(folder)
    template = open_template(folder, text)
    ids = encode_chat(text, template, [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "\u00fc!"}]).ids
    text.decode(ids, skip_special=False)


def read_adapter(folder: Path) -> None:
    shapes = MODEL.shapes()
    rule, deltas, _ = load_adapter(folder, names=shapes)
    check_deltas({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, deltas, str(folder))
    assert isinstance(rule, Lora)


def read_rows(folder: Path) -> None:
    prompts(Source(str(folder / "rows.jsonl"), "chat", 64), DEMO_TEXT, DEMO_TEMPLATE)


def with_config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")

    return change


def with_tensors(change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        changed = {name: change(name, x.clone()) for name, x in load_file(path).items()}
        save_file({name: x.contiguous() for name, x in changed.items() if x is not None}, path)

    return apply


UP = r"model\.layers\.0\.mlp\.up_proj"
BAD_ADAPTERS = {
    "rank of the config": (
        with_config(r=2),
        r"adapter_model\.safetensors: .*q_proj has A \[3, 12\] and B \[24, 3\], expected \[2, in\]",
    ),
    "rank of a tensor": (
        with_tensors(lambda name, x: x[:1] if "0.mlp.up_proj.lora_A" in name else x),
        rf"adapter_model\.safetensors: {UP} has A \[1, 12\] and B \[13, 2\], expected \[2, in\] and \[out, 2\] as adapter_config",
    ),
    "magnitude": (
        with_tensors(lambda name, x: x[1:] if "0.mlp.up_proj.lora_mag" in name else x),
        rf"adapter_model\.safetensors: {UP} has a magnitude \[12\], expected \[13\] as its B has rows",
    ),
    "dtype": (
        with_tensors(lambda name, x: x.int() if "0.mlp.up_proj.lora_A" in name else x),
        rf"adapter_model\.safetensors holds base_model\.model\.{UP}\.lora_A\.weight as torch\.int32, expected floating point",
    ),
    "half of a pair": (
        with_tensors(lambda name, x: None if "0.mlp.up_proj.lora_A" in name else x),
        rf"adapter_model\.safetensors holds base_model\.model\.{UP}\.lora_B\.weight, .*, expected \.lora_A\.weight, \.lora_B",
    ),
    "another model's shape": (
        with_tensors(lambda name, x: x[:, 1:] if "0.mlp.up_proj.lora_A" in name else x),
        rf"{UP}\.weight",
    ),
    "a pattern that takes for ever": (
        with_config(rank_pattern={"(.*)*x": 2}),
        r"adapter_config\.json has '\(\.\*\)\*x' as a pattern, expected a regular expression with at most three repetitions",
    ),
    "a pattern of many repetitions": (with_config(rank_pattern={".*.*.*.*x": 2}), "with at most three repetitions"),
    "a pattern that is none": (
        with_config(alpha_pattern={"(": 2}),
        r"'\(' as a pattern, expected a regular expression .*missing \)",
    ),
    "a deep nest": (
        lambda folder: (folder / "adapter_config.json").write_text("[" * 10_000, encoding="utf-8"),
        r"adapter_config\.json: .*; expected a LoRA",
    ),
}


@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_a_bad_adapter_is_refused_with_file_and_tensor(name: str, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole / "adapter", tmp_path / "adapter"))
    read_adapter(folder)
    damage, message = BAD_ADAPTERS[name]
    damage(folder)
    with pytest.raises(InputError, match=message):
        read_adapter(folder)


def show_report(content: dict[str, Any]) -> None:
    Console(file=io.StringIO()).print(report("x", content))


def open_log(folder: Path) -> None:
    with Log(folder, LogConfig(), {}, Console(file=io.StringIO())) as log:
        log.begin("train")
        log.rewind(1)


def read_pieces(folder: Path) -> None:
    tokenizer.open_tokenizer(folder).encode("Nine lamps.", parse_special=False)


def open_cache(folder: Path) -> None:
    """Open a cache and make it anew where it is damaged."""
    if not array_cache.is_whole(folder):
        with array_cache.filling(folder) as aside:
            np.save(aside / "tokens.npy", np.arange(40, dtype=np.int32))
            (aside / "report.json").write_text('{"n": 40}', encoding="utf-8")
    assert array_cache.load(folder, "tokens")[0].tolist() == list(range(40))


class Subject(NamedTuple):
    """A file, what reads it, how many of its first bytes are worth mutating, and whether a damaged one is refused."""

    file: str
    read: Callable[[Path], Any]
    first: int = 10**6
    is_refused: bool = True  # False: what is damaged is left out, or made again


SUBJECTS = (
    Subject("model-00001-of-00002.safetensors", read_model, 1500),
    Subject("model.safetensors.index.json", read_model),
    Subject("config.json", read_model),
    Subject("config.json", summarize),
    Subject("tokenizer.json", read_text),
    Subject("tokenizer_config.json", read_text),
    Subject("tokenizer.json", summarize),
    Subject("adapter/adapter_config.json", read_adapter),
    Subject("adapter/adapter_model.safetensors", read_adapter, 1500),
    Subject("adapter/minitune.json", read_adapter),
    Subject("adapter/adapter_config.json", summarize),
    Subject("rows.jsonl", read_rows),
    Subject("program.toml", lambda folder: program.load(folder / "program.toml")),
    Subject("step-00000001/state.json", lambda folder: checkpoint.load_state(folder, STATE)),
    Subject("step-00000001/state.safetensors", lambda folder: checkpoint.load_state(folder, STATE)),
)
RUN_FILES = (
    Subject("run/records.json", lambda folder: records.read_records(folder / "records.json")),
    Subject("run/summary.json", lambda folder: show_report(records.read_summary(folder / "summary.json"))),
    Subject("run/manifest.json", lambda folder: read_json(folder / "manifest.json", Manifest, "runs", "begin afresh")),
    Subject("run/metrics.jsonl", lambda folder: open_log(folder), is_refused=False),
    Subject("run/.save/.minitune-files.json", lambda folder: require_unharmed(folder), is_refused=False),
    Subject("rows.parquet", lambda folder: list(readers.read_rows(folder / "rows.parquet"))),
    Subject("pieces/tokenizer.model", read_pieces, 3000),
    Subject("cache/tokens.npy", lambda folder: open_cache(folder), is_refused=False),
    Subject("cache/report.json", lambda folder: open_cache(folder), is_refused=False),
    Subject("cache/checksums.json", lambda folder: open_cache(folder), is_refused=False),
)
SUBJECTS += RUN_FILES
STATE = {"w": torch.arange(6.0), "n": torch.tensor(3)}
SPICE = (
    *(b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"\\ud800"),
    *(b"null", b"-1", b"1e999", b"0.5", b"NaN", b"true", b"{}", b"[]", b'""', b"0"),
    *(
        b"18446744073709551616",
        b"\xff\xfe",
        b"\x00",
        b"\n",
        b'"',
        b",",
        b"}",
        b"..",
        b"/etc/passwd",
        b"\xf0\x9f\x98\x80",
    ),
)


def mutated(whole: bytes, first: int, spice: Sequence[bytes], draw: random.Random) -> bytes:
    """One to three changes: bits flipped, bytes cut, doubled, dropped, or replaced by what parsers stumble over."""
    changed = bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 3))):
        end = min(first, len(changed))
        at = draw.randrange(end + 1)
        to = min(end, at + draw.choice((1, 1, 2, 8, 40)))
        kind = draw.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[at:] = b""
        elif kind == 2:
            changed[at:to] = b""
        elif kind == 3:
            changed[at:at] = changed[at:to]
        elif kind == 4:
            changed[at:to] = draw.choice(SPICE)
        else:
            changed[at:at] = draw.choice(SPICE)
    return bytes(changed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with an adapter, a training state, data and a program in it."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    byte_level(folder.parent)
    params = random_params(SMALL)
    checkpoint.save_folder(folder, params, MODEL, checkpoint.FolderExtras(folder.parent, [3]), shard_bytes=8000)
    rule = Lora(3, 5.0, ("*.q_proj.weight", "*.up_proj.weight"), {"*.up_proj.weight": 2}, dora=True)
    deltas = rule.init(params, 0)
    save_adapter(folder / "adapter", deltas, rule, base=Base("a/b", "f00d"), names=params)
    checkpoint.save_state(folder, 1, STATE, {"marks": {"step": 1}})
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes.", "weight": 1}]
    (folder / "rows.jsonl").write_text(2 * (json.dumps({"messages": turns}) + "\n"), encoding="utf-8")
    (folder / "program.toml").write_text(small_program() + ONE_STEP, encoding="utf-8")
    write_run_files(folder)
    return folder


def write_run_files(folder: Path) -> None:
    """Write what a run leaves, with a token cache, a save, rows in parquet and a sentencepiece tokenizer."""
    sample = {"prompt": "Hi?", "reference": "Yes.", "answer": "No."}
    measured = {"loss_nats": 1.5, "exact_match": 0.5, "n_prompts": 2, "samples": [sample], "time_s": 0.25}
    trained = {"top": {"steps": 3, "tokens_per_s": 10.5}, "n_skipped": 1, "steps": 3, "time_s": 1.5}
    run = folder / "run"
    (run / ".save").mkdir(parents=True)
    stages = {"before": measured, "train": trained, "save": {"what": "deltas", "path": "runs/x"}}
    write_record(run / "records.json", stages)
    write_record(run / "summary.json", records.summary(stages))
    start = Start("2026-01-01T00:00:00", "here", 7, {"minitune": "0.1.0"})
    write_record(run / "manifest.json", Manifest(0, {"a.jsonl": {"sha256": "00", "bytes": 2}}, (start,)))
    row = {"stage": "train", "step": 1, "loss": 1.5}
    (run / "metrics.jsonl").write_text(2 * (json.dumps(row) + "\n"), encoding="utf-8")
    with result_folder(run / "save") as aside:
        (aside / "model.safetensors").write_bytes(b"weights")
    shutil.rmtree(run / ".save")
    (run / "save").rename(run / ".save")
    parquet.write_table(pa.Table.from_pylist([{"text": "one"}, {"text": "two"}]), folder / "rows.parquet")
    shutil.copytree(DEMO, folder / "pieces", ignore=lambda _, names: [name for name in names if "safetensors" in name])
    with array_cache.filling(folder / "cache") as aside:
        np.save(aside / "tokens.npy", np.arange(40, dtype=np.int32))
        (aside / "report.json").write_text('{"n": 40}', encoding="utf-8")


@pytest.mark.parametrize(
    "i", range(len(SUBJECTS)), ids=lambda i: f"{SUBJECTS[i].file}-{getattr(SUBJECTS[i].read, '__name__', i)}"
)
def test_a_mutated_file_is_read_or_refused(i: int, whole: Path, tmp_path: Path) -> None:
    survive(i, whole, tmp_path, N_MUTATIONS // len(SUBJECTS), seed=0)


@pytest.mark.soak
@pytest.mark.parametrize("i", range(len(SUBJECTS)))
def test_soak_mutated_files(i: int, whole: Path, tmp_path: Path) -> None:
    survive(i, whole, tmp_path, N_SOAK // len(SUBJECTS), seed=1)


def survive(i: int, whole: Path, tmp_path: Path, n: int, seed: int) -> None:
    """Read n mutations of a subject: nothing but InputError is raised, and all within 256 MiB. One that is never done with runs
    into the limit that guards every test."""
    file, read, first, is_refused = SUBJECTS[i]
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    place = (folder / file).parent if "/" in file else folder
    content = (folder / file).read_bytes()
    read(place)
    refused, faults, before = 0, [], host.peak_bytes()
    for number in range(n):
        damaged = mutated(content, first, SPICE, random.Random(f"{seed} {file} {number}"))
        (folder / file).parent.mkdir(exist_ok=True)  # a damaged cache is removed
        (folder / file).write_bytes(damaged)
        try:
            read(place)
        except InputError:
            refused += 1
        except Exception as error:  # one long run shows all of them
            where = traceback.extract_tb(error.__traceback__)[-1]
            fault = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
            faults.append(f"mutation {number} of {file}: {fault}: {error!r:.200}: {damaged[:3000]!r}")
    assert not faults, f"{len(faults)} tracebacks\n" + "\n".join(faults[:20])
    assert refused > n / 10 or not is_refused
    assert host.peak_bytes() - before < 256 * 2**20
