"""Training states that several ranks save together: any number of them loads them again, and none is lost by a failure."""

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from minitune import checkpoint, tree
from minitune.checkpoint.sharded_state import parts_to_write, read_region
from minitune.checkpoint.state import load_part
from minitune.cli.inspect import summarize_state
from minitune.errors import InputError
from minitune.io.checksums import checksum, sealed
from minitune.io.state_files import read_parts, tensor_files, whole_entries
from minitune.programs.trained_state import TrainedState
from minitune.sharding.placements import shard_leaf
from minitune.sharding.ranks import Ranks
from support.dying_ranks import save_and_die
from support.fake_ranks import as_rank
from support.models import SMALL, random_batch
from support.ranks import Ranks as Pool
from support.ranks import run_apart
from support.sharded_states import (
    LAYOUTS,
    bits,
    differences,
    failing_saves,
    load_error,
    same_bits,
    save_apart,
    save_parts,
    steps_from,
    whole_state,
)

SIZES = {name: torch.Size(mesh.values()).numel() for name, (mesh, _) in LAYOUTS.items()}


@pytest.fixture(scope="module")
def saved(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one state of each layout, and of one that a single process saved: step i of layout i."""
    folder = tmp_path_factory.mktemp("saved")
    for seed, (layout, n) in enumerate(SIZES.items()):
        ranks.run(n, save_parts, folder, seed, layout)
    checkpoint.save_state(folder, len(SIZES), whole_state(len(SIZES)), {"cursor": [len(SIZES)]}, None)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_of_any_number_and_plan_load_what_others_saved(layout: str, saved: Path, ranks: Pool) -> None:
    assert len(checkpoint.list_states(saved)) == len(LAYOUTS) + 1
    assert ranks.run(SIZES[layout], differences, saved, layout) == [[]] * SIZES[layout]


def test_one_process_loads_what_ranks_saved(saved: Path) -> None:
    for seed, path in enumerate(checkpoint.list_states(saved)):
        whole = whole_state(seed)
        state, meta = checkpoint.load_state(path, tree.map(torch.zeros_like, whole))
        assert (meta["step"], meta["cursor"]) == (seed, [seed])
        assert [name for name, _ in tree.items(state)] == [name for name, _ in tree.items(whole)]
        assert all(same_bits(x, y) for x, y in zip(tree.leaves(state), tree.leaves(whole), strict=True))
        part = load_part(path, "trainable")
        wanted = dict(tree.items(whole["trainable"]))
        assert set(part) == set(wanted)
        assert all(same_bits(part[name], x) for name, x in wanted.items())


FSDP = {"vocab": "data", "heads": "data", "d_ff": "data"}
RUNS = {  # ranks, plan and mesh
    "4 fsdp": (4, FSDP, {"data": 4}),
    "1": (1, None, {}),
    "2 fsdp": (2, FSDP, {"data": 2}),
    "2 dp": (2, None, {}),
    "4 hsdp": (4, FSDP, {"replica": 2, "data": 2}),
}


def test_training_continues_on_other_numbers_of_ranks_and_back(ranks: Pool, tmp_path: Path) -> None:
    batches = {step: random_batch(SMALL, 4, 11, step) for step in range(1, 7)}
    wanted = ranks.run(1, steps_from, tmp_path / "straight", batches, None, {})[0]
    for step, way in enumerate(["4 fsdp", "1", "2 fsdp", "2 dp", "4 hsdp", "4 fsdp"], 1):
        n, plan, mesh = RUNS[way]
        for (loss,) in ranks.run(n, steps_from, tmp_path / "moved", {step: batches[step]}, plan, mesh):
            assert loss == pytest.approx(wanted[step - 1], rel=1e-6), way
    assert len(checkpoint.list_states(tmp_path / "moved")) == 6


def by_hand(folder: Path) -> dict[str, Tensor]:
    """Whole tensors of a state as the safetensors library reads its files and this function puts them together."""
    wholes: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            places = json.loads(file.metadata()["parts"])
            for name in file.keys():  # noqa: SIM118
                x = file.get_tensor(name)
                whole = wholes.setdefault(name, torch.zeros(places[name]["shape"], dtype=x.dtype))
                at = tuple(slice(i, i + n) for i, n in zip(places[name]["offset"], x.shape, strict=True))
                whole[at] = x
    return wholes


def test_the_files_of_ranks_are_what_the_docs_say(saved: Path) -> None:
    for seed, n in enumerate(SIZES.values()):
        path = saved / f"step-{seed:08d}"
        names = [f"state-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        assert sorted(file.name for file in path.iterdir()) == [*names, "state.json"]
        meta = json.loads((path / "state.json").read_text("utf-8"))
        sizes = {name: {"bytes": (path / name).stat().st_size, "sha256": checksum(path / name).sha256} for name in names}
        assert meta["files"] == sizes
        wanted = dict(tree.items(whole_state(seed)))
        wholes = by_hand(path)
        assert set(wholes) == set(wanted)
        assert all(same_bits(wholes[name], x) for name, x in wanted.items())
        assert sum(x.numel() for file in names for x in load_file(path / file).values()) == sum(
            x.numel() for x in wanted.values()
        )


def test_one_process_writes_the_file_that_it_wrote_before(saved: Path) -> None:
    path = checkpoint.list_states(saved)[-1]
    assert sorted(file.name for file in path.iterdir()) == ["state.json", "state.safetensors"]
    meta = json.loads((path / "state.json").read_text("utf-8"))
    assert set(meta) == {"step", "sha256", "cursor", "seal"}
    with safe_open(path / "state.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=5),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    cuts=st.lists(st.tuples(st.sampled_from([None, 0, 1]), st.sampled_from([None, 0, 1])), min_size=5, max_size=5),
)
def test_every_element_is_written_once_and_as_many_bytes_by_each(shapes: Any, sizes: tuple[int, int], cuts: Any) -> None:
    n = sizes[0] * sizes[1]
    wholes = {str(i): bits(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate(shapes)}
    counts = {name: torch.zeros(x.shape) for name, x in wholes.items()}
    loads, largest, copied = [], 0, True
    for rank in range(n):
        with as_rank(rank, {"replica": sizes[0], "data": sizes[1]}) as mesh:
            state = {}
            for (name, x), pair in zip(wholes.items(), cuts, strict=False):
                placed = [Replicate() if cut is None or cut >= x.ndim else Shard(cut) for cut in pair]
                placed = placed if placed[0] != placed[1] else [Replicate(), placed[1]]
                state[name] = shard_leaf(x, placed, mesh)
                copied = copied and not isinstance(state[name], DTensor)
            own = parts_to_write(state, Ranks(rank, n)).parts
        for name, part in own.items():
            at = tuple(slice(i, i + size) for i, size in zip(part.offset, part.tensor.shape, strict=True))
            assert same_bits(part.tensor, wholes[name][at].contiguous())
            counts[name][at] += 1
            largest = max(largest, part.tensor.numel())
        loads.append(sum(part.tensor.numel() for part in own.values()))
    assert all(bool((count == 1).all()) for count in counts.values())
    if copied:
        assert max(loads) - min(loads) <= largest


@pytest.mark.parametrize("chunk_bytes", [1, 120, 2**24])
def test_any_region_is_read_in_any_pieces(chunk_bytes: int, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minitune.checkpoint import sharded_state
    from minitune.io.state_files import Region

    monkeypatch.setattr(sharded_state, "CHUNK_BYTES", chunk_bytes)
    for seed in range(len(SIZES)):
        stored = read_parts(tensor_files(saved / f"step-{seed:08d}"))
        w = whole_state(seed)["trainable"]["expert.w"]
        for offset, shape in (((0, 0, 0), (3, 5, 6)), ((1, 2, 1), (2, 3, 4)), ((2, 4, 5), (1, 1, 1)), ((3, 0, 0), (0, 5, 6))):
            at = tuple(slice(i, i + n) for i, n in zip(offset, shape, strict=True))
            assert same_bits(read_region(stored["trainable.expert.w"], Region(offset, shape)), w[at].contiguous())


@pytest.mark.parametrize(
    ("at_rank", "code", "in_background"),
    [(0, errno.ENOSPC, False), (1, errno.EIO, False), (0, errno.EIO, True), (1, errno.ENOSPC, True)],
    ids=["full", "broken", "broken in the background", "full in the background"],
)
def test_a_failure_of_any_operation_of_a_rank_ends_the_save_on_all(
    at_rank: int, code: int, in_background: bool, ranks: Pool, tmp_path: Path
) -> None:
    first, second = ranks.run(2, failing_saves, tmp_path, at_rank, code, in_background)
    assert first == second
    *failed, last = first
    assert last == ("", [1, 2, 3])
    assert all(steps in ([1, 2], [1, 2, 3]) for _, steps in failed)
    wanted = r"DiskFullError: io: .*step-00000003 does not fit on its disk" if code == errno.ENOSPC else r"OSError: \[Errno 5\]"
    assert sum(re.match(wanted, error) is not None for error, _ in failed) > 10
    assert all(re.match(wanted, error) for error, _ in failed if error)
    assert all(error for error, steps in failed if steps == [1, 2])


@pytest.mark.parametrize(("dying", "how"), [(0, "at-once"), (1, "at-once"), (1, "in-background")])
def test_a_rank_that_dies_amid_a_save_leaves_the_state_before(dying: int, how: str, tmp_path: Path) -> None:
    folder, told = tmp_path / "states", tmp_path / "told"
    assert run_apart(2, save_and_die, folder, dying, how == "in-background", told) == [0, 0]
    assert told.read_text("utf-8") == f"rank {1 - dying} lost a rank\n"
    assert [path.name for path in checkpoint.list_states(folder)] == ["step-00000001"]
    whole = {name: torch.arange(35.0).view(7, 5) for name in "abc"}
    state, _ = checkpoint.load_state(folder / "step-00000001", tree.map(torch.zeros_like, whole))
    assert all(torch.equal(state[name], x) for name, x in whole.items())
    checkpoint.save_state(folder, 2, whole, {})
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]


def test_ranks_that_share_no_disk_are_told(ranks: Pool, tmp_path: Path) -> None:
    told = ranks.run(2, save_apart, tmp_path)
    message = (
        r"checkpoint: .*/1/\.step-00000001\..*, which the first process made, is not there for another one, expected one disk"
    )
    assert told[0] == told[1]
    assert re.match(message, told[0])


def test_parts_that_are_still_to_be_summed_are_no_state() -> None:
    for placed in ((Replicate(), Partial()), (Shard(0), Shard(0))):
        with as_rank(1, {"replica": 2, "data": 2}) as mesh:
            w = DTensor.from_local(torch.ones(2, 2), mesh, placed, run_check=False)
            with pytest.raises(TypeError, match="expected copies and cuts, of one dim each"):
                parts_to_write({"w": w}, Ranks(1, 4))


def test_a_flipped_byte_is_told_by_all_ranks(saved: Path, ranks: Pool, tmp_path: Path) -> None:
    path = tmp_path / "step-00000003"
    shutil.copytree(saved / path.name, path)
    file = path / "state-00002-of-00004.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    told = ranks.run(3, load_error, tmp_path, "columns of 3")
    assert told == [f"checkpoint: {file} does not match its sha256; remove {path} to continue from the step before"] * 3
    with pytest.raises(InputError, match=r"00002-of-00004.safetensors does not match its sha256"):
        checkpoint.load_state(path, whole_state(3))


def rewritten(file: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Change the tensors of a file and their places, and make its state.json fit them again."""
    with safe_open(file, "pt") as opened:
        places = json.loads(opened.metadata()["parts"])
    tensors = {name: x.clone() for name, x in load_file(file).items()}
    change(tensors, places)
    save_file(tensors, file, {"parts": json.dumps(places)})
    meta = json.loads((file.parent / "state.json").read_text("utf-8"))
    del meta["seal"]
    meta["files"][file.name] = {"bytes": file.stat().st_size, "sha256": checksum(file).sha256}
    (file.parent / "state.json").write_text(json.dumps(sealed(meta)), encoding="utf-8")


W = "trainable.w"


def moved_to(offset: list[int]) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda _, places: places[W].update(offset=offset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors, places: (tensors.pop(W), places.pop(W)),
            r"holds 1 parts of trainable\.w \(in .*of-00002\.safetensors\)",
        ),
        (lambda tensors, _: tensors.pop(W), r"00002-of-00002\.safetensors says no place of trainable\.w"),
        (lambda _, places: places.pop(W), r"00002-of-00002\.safetensors says no place of trainable\.w"),
        (moved_to([0, 0]), r"holds 2 parts of trainable\.w .* not all of its \[7, 5\], each once"),
        (moved_to([3, 0]), r"holds 2 parts of trainable\.w .* not all of its \[7, 5\], each once"),
        (
            moved_to([5, 0]),
            r"00002-of-00002\.safetensors holds of trainable\.w F32\[3, 5\] at \[5, 0\] of \[7, 5\], which is no part",
        ),
        (moved_to([4]), r"holds of trainable\.w F32\[3, 5\] at \[4\] of \[7, 5\], which is no part"),
        (
            lambda tensors, _: tensors.update({W: tensors[W].double()}),
            r"holds of trainable\.w F64\[3, 5\] .* no part of F32\[7, 5\]",
        ),
        (lambda tensors, places: places.update({W: 3}), r"00002-of-00002\.safetensors is no whole safetensors file"),
    ],
)
def test_parts_that_make_up_no_whole_are_refused(change: Any, message: str, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-00000001"
    shutil.copytree(saved / path.name, path)
    rewritten(path / "state-00002-of-00002.safetensors", change)
    with pytest.raises(InputError, match=rf"checkpoint: .*{message}.*; remove .* to continue from the step before"):
        checkpoint.load_state(path, whole_state(1))


def test_missing_and_foreign_files_are_refused_and_kept(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-00000001"
    shutil.copytree(saved / path.name, path)
    file = path / "state-00002-of-00002.safetensors"
    shutil.copy(file, path / "state-00003-of-00003.safetensors")
    with pytest.raises(InputError, match=r"state-00003-of-00003.safetensors is no file of the state beside it, .*; move it away"):
        checkpoint.load_state(path, whole_state(1))
    (path / "state-00003-of-00003.safetensors").rename(path / "state-00003-of-00003.mine")
    with pytest.raises(InputError, match=r"holds state-00003-of-00003.mine, expected"):
        checkpoint.save_state(tmp_path, 1, whole_state(1), {})
    file.unlink()
    with pytest.raises(InputError, match=r"can't be read .*00002-of-00002.safetensors.*; remove"):
        checkpoint.load_state(path, whole_state(1))


@pytest.mark.parametrize(
    "names", [["../a.safetensors"], ["state-00001-of-00002.safetensors"], ["state-00002-of-00002.safetensors"] * 2]
)
def test_a_state_json_that_names_no_files_of_a_state_is_refused(names: list[str], saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-00000001"
    shutil.copytree(saved / path.name, path)
    files = {name: {"bytes": 1, "sha256": "0"} for name in names}
    (path / "state.json").write_text(json.dumps(sealed({"step": 1, "files": files})), encoding="utf-8")
    with pytest.raises(InputError, match=r"can't be read \(state.json names .*, which are no files of a state\)"):
        checkpoint.load_state(path, whole_state(1))


def test_a_state_of_another_program_is_refused(saved: Path) -> None:
    like = whole_state(1)
    path = saved / "step-00000001"
    with pytest.raises(InputError, match=r"differ in trainable\.v"):
        checkpoint.load_state(path, {**like, "trainable": {**like["trainable"], "v": torch.ones(1)}})
    with pytest.raises(InputError, match=r"holds trainable\.w torch\.float32\[7, 5\], expected torch\.float32\[4, 5\]"):
        checkpoint.load_state(path, {**like, "trainable": {**like["trainable"], "w": torch.ones(4, 5)}})


def test_inspect_tells_whole_tensors_and_damaged_files(saved: Path, tmp_path: Path) -> None:
    told = []
    for seed in range(len(SIZES) + 1):
        state = TrainedState(saved / f"step-{seed:08d}", tmp_path, {"op": "train", "steps": 9}, (), {"path": "base"})
        summary = summarize_state(state)
        assert summary.faults == []
        told.append({key: summary.rows[key] for key in ("parameters", "dtypes")})
        entries = whole_entries(read_parts(tensor_files(state.folder)))
        assert {name: entry.shape for name, entry in entries.items()} == {
            name: tuple(x.shape) for name, x in tree.items(whole_state(seed))
        }
    assert all(one == told[0] for one in told)
    path = tmp_path / "step-00000002"
    shutil.copytree(saved / path.name, path)
    damaged = TrainedState(path, tmp_path, {"op": "train", "steps": 9}, (), {"path": "base"})
    (path / "state-00001-of-00003.safetensors").unlink()
    assert "00001-of-00003.safetensors does not exist, expected it beside state-00002" in summarize_state(damaged).faults[0]
    shutil.copy(saved / path.name / "state-00001-of-00003.safetensors", path)
    (path / "state-00003-of-00003.safetensors").write_bytes(b"torn")
    assert "00003-of-00003.safetensors is no whole safetensors file" in summarize_state(damaged).faults[0]
