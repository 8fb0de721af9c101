"""What is kept of a frozen model is what it says live, whatever it was batched with; a stale or broken cache is never read."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from minitune.algorithms import precompute
from minitune.algorithms.distillation import Teacher
from minitune.algorithms.precompute import reference_logps, teacher_tops, with_teacher
from minitune.algorithms.preference import pair_logps
from minitune.checkpoint.fingerprint import fingerprint, folder_fingerprint
from minitune.data import packing, preference
from minitune.data.cursor import Cursor
from minitune.data.preference import PairSet
from minitune.data.source import Source
from minitune.data.supervised import Dataset, take
from minitune.data.token_store import Documents, Report
from minitune.errors import InputError
from minitune.io.checksums import CHECKSUMS, write_checksums
from minitune.lora import Lora
from minitune.models import Model, decoder
from minitune.models import model as model_file
from minitune.models.families import llama
from minitune.nn import head
from minitune.quant.tensors import QInt8
from minitune.types import Pairs, UnpairedBatch
from support.models import SMALL as TWO_LAYERS
from support.models import random_params

SMALL = msgspec.structs.replace(TWO_LAYERS, n_layers=1)
MODEL, PARAMS = Model(llama.FAMILY, SMALL), random_params(SMALL)
RULE = Lora(rank=3, alpha=5.0, targets=("*_proj.weight",))
DELTAS = RULE.init(PARAMS, 0)
DELTAS = {name: delta._replace(b=torch.full_like(delta.b, 0.05)) for name, delta in DELTAS.items()}
ADAPTED = RULE.apply(PARAMS, DELTAS)
TEACHER = Teacher(MODEL, ADAPTED)
SEQ_LEN = 23
SOURCE = Source("f.jsonl", "instruct", SEQ_LEN)


def random_documents(lengths: Sequence[int], seed: int = 0) -> Documents:
    """Documents of these lengths with random tokens; each has a target, and none at its start."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    mask = rng.random(offsets[-1]) < 0.6
    mask[offsets[1:] - 1], mask[offsets[:-1]] = True, False
    return Documents(rng.integers(0, SMALL.vocab_size, offsets[-1], dtype=np.int32), mask, offsets)


def random_dataset(lengths: Sequence[int], packed: bool = True) -> Dataset:
    report = Report(len(lengths), sum(lengths), 0, 0, 0, 0)
    order = lru_cache(maxsize=2)(lambda seed, epoch: packing.epoch_rows(lengths, SEQ_LEN, packed, seed, epoch))
    return Dataset(*random_documents(lengths), report, order, f"{lengths}")


def random_pairs(lengths: Sequence[int], unpaired: bool) -> PairSet:
    n = len(lengths) if unpaired else len(lengths) // 2
    lengths = lengths if unpaired else lengths[: 2 * n]
    report = Report(n, sum(lengths), 0, 0, 0, 0)
    order = lru_cache(maxsize=2)(lambda seed, epoch: packing.permutation(n, seed, "pairs", epoch))
    more = (np.arange(n) % 3 == 0, np.roll(np.arange(n), 1)) if unpaired else (None, None)
    return PairSet(random_documents(lengths), *more, report, order, f"{lengths} {unpaired}")


lengths_of = st.lists(st.integers(2, SEQ_LEN), min_size=2, max_size=6)


@settings(max_examples=8)
@given(lengths=lengths_of, unpaired=st.booleans(), forward_tokens=st.sampled_from([29, 97, 4096]), n_rows=st.integers(1, 5))
def test_cached_log_probs_are_the_live_ones(
    lengths: list[int], unpaired: bool, forward_tokens: int, n_rows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pairset = random_pairs(lengths, unpaired)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precompute, "FORWARD_TOKENS", forward_tokens)
        said = reference_logps(MODEL, ADAPTED, pairset, SOURCE, tmp_path_factory.mktemp("cache"))
    assert (said.dtype, said.shape) == (np.float32, (pairset.report.n_samples, 2))
    batch, _ = preference.take(pairset, Cursor(0, 0), n_rows, SOURCE, 1, said)
    assert isinstance(batch.reference, torch.Tensor)
    live = pair_logps(MODEL, ADAPTED, Pairs(batch[0], batch[1]))
    torch.testing.assert_close(batch.reference, torch.stack(live[:2], dim=1), rtol=1e-6, atol=1e-6)
    assert isinstance(batch, UnpairedBatch) == unpaired
    # and an independent reading of them, one answer at a time, without padding
    rows = pairset.order(1, 0)
    for row, kept in zip(rows[:n_rows], batch.reference, strict=False):
        one = pairset.answers.at(row if unpaired else 2 * row)
        logits = MODEL.forward(ADAPTED, torch.from_numpy(one.tokens.astype(np.int64))[None])[0].log_softmax(-1)
        logps = [logits[t - 1, one.tokens[t]] for t in range(len(one.tokens)) if one.mask[t]]
        torch.testing.assert_close(kept[0], torch.stack(logps).sum(), rtol=1e-5, atol=1e-5)


@settings(max_examples=8)
@given(
    lengths=lengths_of,
    packed=st.booleans(),
    k=st.sampled_from([1, 3, 17]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    forward_tokens=st.sampled_from([29, 4096]),
    chunk=st.sampled_from([1, 200, 2**22]),
)
def test_cached_tops_are_the_live_ones(
    lengths: list[int],
    packed: bool,
    k: int,
    temperature: float,
    forward_tokens: int,
    chunk: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    dataset = random_dataset(lengths, packed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precompute, "FORWARD_TOKENS", forward_tokens)
        patch.setattr(head, "HEAD_CHUNK", chunk)
        patch.setattr(head, "HEAD_ROWS", 1)
        tops = teacher_tops(TEACHER, dataset, k, temperature, tmp_path_factory.mktemp("cache"))
    assert [(x.dtype, x.shape) for x in tops] == [(np.int32, (sum(lengths), k)), (np.float32, (sum(lengths), k))]
    source = Source("f.jsonl", "instruct", SEQ_LEN, packed)
    places = dataset._replace(tokens=np.arange(sum(lengths)))
    cursor, n_rows = Cursor(0, len(dataset.order(3, 0)) - 1), 3
    batch, _ = take(dataset, cursor, n_rows, source, 3)
    known = with_teacher(batch, take(places, cursor, n_rows, source, 3)[0].tokens, tops)
    assert known.top_ids.shape == known.top_logps.shape == (*batch.tokens.shape, k)
    assert known.rows is batch
    logits = MODEL.forward(ADAPTED, batch.tokens, segment_ids=batch.segment_ids).roll(1, 1)  # of each token's prediction
    live = (logits / temperature).log_softmax(-1)
    targets = batch.target_mask()
    torch.testing.assert_close(live.gather(-1, known.top_ids)[targets], known.top_logps[targets], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(live.topk(k).values[targets], known.top_logps[targets], rtol=1e-6, atol=1e-6)
    assert (known.top_ids[targets].sort(-1).values.diff(dim=-1) > 0).all()  # k different tokens
    assert not tops.logps[~dataset.mask].any()  # what has no loss is not computed


def test_a_quantized_frozen_model_speaks_too(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    codes = torch.randint(-127, 128, PARAMS[name].shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    leaf = QInt8(codes, torch.full((len(codes), 1), 0.003))
    params = {**PARAMS, name: leaf}
    pairset = random_pairs([5, 3], unpaired=False)
    said = reference_logps(MODEL, params, pairset, SOURCE, tmp_path)
    wide = reference_logps(MODEL, {**PARAMS, name: codes * 0.003}, pairset, SOURCE, tmp_path)
    np.testing.assert_allclose(said, wide, rtol=1e-4)
    assert len(list(tmp_path.iterdir())) == 2


def entries(folder: Path) -> int:
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_the_caches_are_made_anew_when_anything_changes(tmp_path: Path) -> None:
    pairset, dataset = random_pairs([5, 3, 4, 8], unpaired=False), random_dataset([5, 3, 4])
    name = "model.layers.0.mlp.up_proj.weight"
    changed = PARAMS[name].index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(0.125))
    other = {**ADAPTED, name: ADAPTED[name]._replace(w=changed)}
    config = Model(llama.FAMILY, msgspec.structs.replace(SMALL, rope_theta=77.0))

    def refer(model: Model = MODEL, params: Any = ADAPTED, pairset: PairSet = pairset) -> int:
        reference_logps(model, params, pairset, SOURCE, tmp_path / "reference")
        return entries(tmp_path / "reference")

    assert [refer(), refer()] == [1, 1]
    assert refer(params=other) == 2
    assert refer(params=PARAMS) == 3
    assert refer(model=config) == 4
    assert refer(pairset=pairset._replace(key="other")) == 5
    assert refer(params=RULE.apply({key: w.double() for key, w in PARAMS.items()}, DELTAS)) == 6

    def teach(teacher: Teacher = TEACHER, dataset: Dataset = dataset, k: int = 3, temperature: float = 1.0) -> int:
        teacher_tops(teacher, dataset, k, temperature, tmp_path / "tops")
        return entries(tmp_path / "tops")

    assert [teach(), teach()] == [1, 1]
    assert teach(teacher=TEACHER._replace(params=other)) == 2
    assert teach(dataset=dataset._replace(key="other")) == 3
    assert teach(k=4) == 4
    assert teach(temperature=2.0) == 5


def test_a_kept_value_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairset, dataset = random_pairs([5, 3, 4, 8], unpaired=True), random_dataset([5, 3, 4])
    first = reference_logps(MODEL, ADAPTED, pairset, SOURCE, tmp_path), teacher_tops(TEACHER, dataset, 2, 1.0, tmp_path)
    monkeypatch.setattr(decoder, "hidden", None)
    second = reference_logps(MODEL, ADAPTED, pairset, SOURCE, tmp_path), teacher_tops(TEACHER, dataset, 2, 1.0, tmp_path)
    assert isinstance(second[0], np.memmap)
    assert isinstance(second[1].ids, np.memmap)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1].logps, second[1].logps)


def test_nothing_is_left_of_a_computation_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    linear = model_file.linear
    monkeypatch.setattr(head, "HEAD_CHUNK", 1)
    monkeypatch.setattr(head, "HEAD_ROWS", 1)
    monkeypatch.setattr(model_file, "linear", lambda *args: [calls.append(1), linear(*args)][1] if len(calls) < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        teacher_tops(TEACHER, random_dataset([5, 3, 4]), 2, 1.0, tmp_path)
    assert (len(calls), entries(tmp_path)) == (3, 0)


def test_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[Any] = []

    class Bar:
        def update(self, done: int, readings: dict[str, float]) -> None:
            reports.append((done, readings))

    @contextmanager
    def progress(title: str, total: int) -> Iterator[Bar]:
        reports.append((title, total))
        yield Bar()
        reports.append("closed")

    monkeypatch.setattr(precompute, "FORWARD_TOKENS", 10)
    reference_logps(MODEL, ADAPTED, random_pairs([5, 3, 4, 8, 2, 2], False), SOURCE, tmp_path, progress)
    assert reports == [("reference log-probs", 3), (1, {}), (3, {}), "closed"]
    reports = []
    teacher_tops(TEACHER, random_dataset([5, 3, 4]), 2, 1.0, tmp_path, progress)
    assert reports == [("teacher", 3), (2, {}), (3, {}), "closed"]


@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b"", None], ids=["cut", "empty", "gone"])
@pytest.mark.parametrize("name", ["logps.npy", "ids.npy"])
def test_a_damaged_cache_is_made_again(name: str, damage: Callable[[bytes], bytes] | None, tmp_path: Path) -> None:
    pairset, dataset = random_pairs([5, 3], unpaired=False), random_dataset([5, 3, 4])
    compute = {
        "reference": lambda: reference_logps(MODEL, ADAPTED, pairset, SOURCE, tmp_path / "reference"),
        "tops": lambda: teacher_tops(TEACHER, dataset, 2, 1.0, tmp_path / "tops"),
    }
    for kind in ["tops"] if name == "ids.npy" else compute:
        compute[kind]()
        (file,) = (tmp_path / kind).glob(f"*/{name}")
        content = file.read_bytes()
        file.unlink()
        if damage is not None:
            file.write_bytes(damage(content))
        compute[kind]()
        assert file.read_bytes() == content
        np.save(file, np.zeros((7, 2)))
        (file.parent / CHECKSUMS).unlink()
        write_checksums(file.parent, file.parent.iterdir())
        with pytest.raises(InputError, match=r"is damaged \((an array|arrays) of .*\[7, 2\].*delete the folder"):
            compute[kind]()


@pytest.mark.parametrize("k", [0, -1, 18])
def test_more_tops_than_the_vocabulary_holds_are_refused(k: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"precompute: top_k = {k}, expected 1 to 17, the teacher's vocabulary; change it"):
        teacher_tops(TEACHER, random_dataset([5, 3]), k, 1.0, tmp_path)


@given(st.data())
def test_a_fingerprint_tells_every_byte(given_: st.DataObject) -> None:
    leaves = {"a": torch.arange(6.0).view(2, 3).bfloat16(), "b": (torch.tensor(3), torch.zeros(0)), "c": None}
    known = fingerprint(leaves)
    assert known == fingerprint({"a": leaves["a"].clone(), "b": leaves["b"], "c": None})
    assert known == fingerprint({**leaves, "a": leaves["a"].T.contiguous().T})  # how it lies in memory does not count
    i = given_.draw(st.integers(0, 5))
    changed = leaves["a"].flatten().index_put((torch.tensor([i]),), torch.tensor([7.0]).bfloat16()).view(2, 3)
    others = [
        {**leaves, "a": changed},
        {**leaves, "a": leaves["a"].view(3, 2)},
        {**leaves, "a": leaves["a"].view(torch.float16)},
        {"z": leaves["a"], "b": leaves["b"]},
        {**leaves, "b": (torch.tensor(4), torch.zeros(0))},
    ]
    assert len({known, *map(fingerprint, others)}) == 6


def test_a_folder_is_known_by_its_config_headers_and_samples(tmp_path: Path) -> None:
    big = torch.arange(5000.0)
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}), encoding="utf-8")

    def fingerprint_of(**tensors: torch.Tensor) -> str:
        save_file({"x": big, "y": torch.ones(3, dtype=torch.bfloat16), **tensors}, tmp_path / "model.safetensors")
        return folder_fingerprint(tmp_path)

    known = fingerprint_of()
    assert fingerprint_of() == known
    changes = [big.index_put((torch.tensor(i),), torch.tensor(-1.0)) for i in (0, 2600, 4999)]
    prints = {
        known,
        *(fingerprint_of(x=x) for x in changes),
        fingerprint_of(y=torch.zeros(3, dtype=torch.bfloat16)),
        fingerprint_of(z=torch.ones(1)),
    }
    assert len(prints) == 6
    fingerprint_of()
    (tmp_path / "config.json").write_text(json.dumps({"a": 2}), encoding="utf-8")
    assert folder_fingerprint(tmp_path) not in prints
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}), encoding="utf-8")
    assert folder_fingerprint(tmp_path) == known
    save_file({"q": torch.ones(1)}, tmp_path / "model-2.safetensors")
    assert folder_fingerprint(tmp_path) != known


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"checkpoint: .* holds no \*.safetensors, expected a Hugging Face folder; correct the path"
    ):
        folder_fingerprint(tmp_path)
    save_file({"q": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"checkpoint: .* can't be read \(FileNotFoundError.*\), expected whole safetens"):
        folder_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    for content in (b"", b"\x05\x00\x00\x00\x00\x00\x00\x00[1,2]", b"\xff" * 9):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(
            InputError, match=r"checkpoint: .* can't be read \(.*\), expected whole safetensors; download it again"
        ):
            folder_fingerprint(tmp_path)
