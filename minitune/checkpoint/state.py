"""Training states on disk: written aside, synced and renamed, so that a crash loses nothing."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitune import tree
from minitune.checkpoint.sharded_state import (
    OwnPart,
    OwnParts,
    loaded,
    parts_to_write,
    read_region,
)
from minitune.checkpoint.shared_outcome import SharedOutcome
from minitune.checkpoint.tensors import dtype_of, serialized
from minitune.checkpoint.unharmed import unharmed_parts
from minitune.errors import InputError
from minitune.io.atomic import (
    GONE,
    NEW,
    OLD,
    atomic_folder,
    disk_full_is_input_error,
    recover_replaced,
    remove_folder,
    require_room,
    sync,
    unfinished,
    write_json,
)
from minitune.io.checksums import Checksum, sealed
from minitune.io.safetensors_header import NO_METADATA
from minitune.io.state_files import (
    META,
    SINGLE,
    Region,
    StoredPart,
    is_state_file,
    parts_metadata,
    tensor_file,
)
from minitune.sharding.ranks import ALONE, Ranks
from minitune.tree import Tree

STATE = re.compile(r"step-\d{8,}")  # and no step-00000003.bak or step-notes beside it


def save_state(
    folder: Path,
    step: int,
    state: Tree,
    meta: Mapping[str, Any],
    keep: int | None = 2,
    ranks: Ranks = ALONE,
) -> Path:
    """Commit a training state as folder/step-N and drop all but the newest `keep`, or none if that
    is None.

    All ranks of a run call it, on a folder that they share. Each writes a file of its own: the
    parts that it holds, of which each is written once. Where one fails, all raise its error.
    A crash of any leaves the earlier states whole, and a state that can't be dropped stays without
    a word: the new one is committed. InputError, before anything is written, if the disk is too
    small.
    """
    return save_parts(folder, step, parts_to_write(state, ranks), meta, keep, ranks)


def save_parts(
    folder: Path,
    step: int,
    parts: OwnParts,
    meta: Mapping[str, Any],
    keep: int | None,
    ranks: Ranks,
) -> Path:
    """Commit a state of which each rank gives the parts that it writes, as `save_state` does."""
    path = folder / f"step-{step:08d}"
    outcome = SharedOutcome(ranks)
    with outcome.block():
        if ranks.is_first:
            _require_free(path, parts.n_bytes)
    with _shared_folder(path, outcome) as aside:
        with outcome.block(), disk_full_is_input_error(path):
            own = _write_parts(aside, parts.parts, ranks)
        written = _checksums(own, outcome)
        if ranks.is_first:
            content = {"step": step, **written, **meta}
            write_json(aside / META, sealed(json.loads(json.dumps(content))))
    if keep is not None and ranks.is_first:
        drop_old_states(folder, keep)
    return path


def _require_free(path: Path, n_bytes: int) -> None:
    """InputError if a state has no room at a path, or would take the place of a user's files."""
    if extras := _extras(path):
        raise InputError(
            f"checkpoint: {path} holds {extras[0]}, expected {META} and {SINGLE} alone; move it "
            "away"
        )
    _remove_leftovers(path.parent)
    require_room(path, n_bytes, "the training state")


@contextmanager
def _shared_folder(path: Path, outcome: SharedOutcome) -> Iterator[Path]:
    """Folder that all ranks fill, which takes the place of `path` when the block has ended without
    an error on all of them.
    """
    is_first = outcome.ranks.is_first
    with (
        outcome.block(),
        atomic_folder(path) if is_first else nullcontext(unfinished(path)) as aside,
    ):
        with outcome.block():
            pass  # the first rank has made it
        with outcome.block():
            if not aside.is_dir():
                raise InputError(
                    f"checkpoint: {aside}, which the first process made, is not there for another "
                    "one, expected one disk for all; name a folder that every machine mounts"
                )
        yield aside


def _write_parts(folder: Path, own: Mapping[str, OwnPart], ranks: Ranks) -> Checksum:
    """Write the file of this rank, and give its checksum, made while it is written."""
    places = {name: (part.whole, part.offset) for name, part in own.items()}
    metadata = NO_METADATA if ranks.size == 1 else parts_metadata(places)
    digest, n_bytes = hashlib.sha256(), 0
    path = folder / tensor_file(ranks.rank, ranks.size)
    with path.open("wb") as file:
        for piece in serialized({name: part.tensor for name, part in own.items()}, metadata):
            digest.update(piece)
            file.write(piece)
            n_bytes += len(piece)
    if ranks.size > 1:
        sync(path)
    return Checksum(n_bytes, digest.hexdigest())


def _checksums(own: Checksum, outcome: SharedOutcome) -> dict[str, Any]:
    """Checksums of the files of all ranks, as state.json has them."""
    n = outcome.ranks.size
    if n == 1:
        return {"sha256": own.sha256}
    rows = outcome.gather(torch.tensor([own.bytes, *bytes.fromhex(own.sha256)])).tolist()
    return {
        "files": {
            tensor_file(i, n): {"bytes": n_bytes, "sha256": bytes(digest).hex()}
            for i, (n_bytes, *digest) in enumerate(rows)
        }
    }


def drop_old_states(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` states, and what a killed process left half written or half
    removed.

    A state's folder that holds a user's files stays, and so does one that can't be removed.
    """
    _remove_leftovers(folder)
    for old in list_states(folder)[:-keep]:
        if not _extras(old):
            with suppress(OSError):
                remove_folder(old)


def _remove_leftovers(folder: Path) -> None:
    for left in (*folder.glob(f".step-*{NEW}"), *folder.glob(f".step-*{GONE}")):
        shutil.rmtree(left, ignore_errors=True)


def _extras(path: Path) -> list[str]:
    """Names in a state's folder that are no part of a state: a user put them there, so they are
    not removed.
    """
    return (
        sorted(file.name for file in path.iterdir() if not is_state_file(file.name))
        if path.is_dir()
        else []
    )


def list_states(folder: Path) -> list[Path]:
    """Training states in a folder, oldest first; one that a crash left half replaced takes its
    place again.
    """
    for old in folder.glob(f".step-*{OLD}"):
        recover_replaced(old)
    states = [
        path for path in folder.glob("step-*") if path.is_dir() and STATE.fullmatch(path.name)
    ]
    return sorted(states, key=lambda path: (len(path.name), path.name))


def state_step(state: Path) -> int:
    """Step of a training state, by the name of its folder."""
    return int(state.name.removeprefix("step-"))


def load_state(path: Path, like: Tree, ranks: Ranks = ALONE) -> tuple[Tree, dict[str, Any]]:
    """(state, meta) of a committed step, in the structure of `like`, by any number of ranks,
    whatever number saved it.

    Of a DTensor in `like` the part of this rank is read, of every other leaf all of it. InputError
    if a byte, name, shape or dtype differs. All ranks of a run call it, and each checks some of the
    files for all.
    """
    with SharedOutcome(ranks).block():
        meta, stored = unharmed_parts(path, ranks)
        wanted = dict(tree.items(like))
        _require_same(path, stored, wanted)
        return tree.rebuild(like, [loaded(stored[name], x) for name, x in wanted.items()]), meta


def load_part(path: Path, name: str) -> dict[str, Tensor]:
    """Tensors of one part of a state, such as "trainable", by their paths in it; InputError if a
    byte differs."""
    _, stored = unharmed_parts(path, ALONE)
    return {
        key.removeprefix(f"{name}."): read_region(parts, _whole(parts))
        for key, parts in stored.items()
        if key.startswith(f"{name}.")
    }


def _whole(parts: Sequence[StoredPart]) -> Region:
    shape = parts[0].whole
    return Region((0,) * len(shape), shape)


def _require_same(
    path: Path, stored: Mapping[str, Sequence[StoredPart]], wanted: Mapping[str, Tensor]
) -> None:
    """InputError if a saved state has other names, shapes or dtypes than are wanted."""
    unmatched = sorted(set(stored) ^ set(wanted))
    if unmatched:
        raise InputError(
            f"checkpoint: {path} and this program differ in {unmatched[0]} (and "
            f"{len(unmatched) - 1} more); it is of another program"
        )
    for name, leaf in wanted.items():
        shape, dtype = stored[name][0].whole, dtype_of(stored[name][0].entry.dtype)
        if shape != tuple(leaf.shape) or dtype != leaf.dtype:
            raise InputError(
                f"checkpoint: {path} holds {name} {dtype}{list(shape)}, expected "
                f"{leaf.dtype}{list(leaf.shape)}"
            )
