"""Training states on disk: written aside, synced and renamed, so that a crash loses nothing."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from minitune import tree
from minitune.checkpoint.tensors import load_tensors, serialized
from minitune.errors import InputError
from minitune.io.atomic import (
    GONE,
    NEW,
    OLD,
    atomic_folder,
    recover_replaced,
    remove_folder,
    require_room,
    write_json,
)
from minitune.io.checksums import sealed, unsealed
from minitune.sharding.parts import cut_part, is_sharded, placed_of
from minitune.tree import Tree

STATE = re.compile(r"step-\d{8,}")  # and no step-00000003.bak or step-notes beside it
STATE_FILES = ("state.json", "state.safetensors")


def save_state(
    folder: Path,
    step: int,
    state: Tree,
    meta: Mapping[str, Any],
    keep: int | None = 2,
) -> Path:
    """Commit a training state as folder/step-N and drop all but the newest `keep`, or none if that
    is None.

    A crash leaves the earlier ones whole, and a state that can't be dropped stays without a word:
    the new one is committed. InputError, before anything is written, if the disk is too small.
    """
    path = folder / f"step-{step:08d}"
    if extras := _extras(path):
        raise InputError(
            f"checkpoint: {path} holds {extras[0]}, expected {' and '.join(STATE_FILES)} alone; "
            "move it away"
        )
    _remove_leftovers(folder)
    require_room(path, tree.n_bytes(state), "the training state")
    with atomic_folder(path) as aside:
        digest = hashlib.sha256()
        with (aside / "state.safetensors").open("wb") as file:
            for piece in serialized(dict(tree.items(state))):
                digest.update(piece)
                file.write(piece)
        content = {"step": step, "sha256": digest.hexdigest(), **meta}
        write_json(aside / "state.json", sealed(json.loads(json.dumps(content))))
    if keep is not None:
        drop_old_states(folder, keep)
    return path


def join_save(state: Tree) -> None:
    """Give this rank's parts to the rank that saves the state, which calls save_state at the same
    time; nothing is written.
    """
    for _ in serialized(dict(tree.items(state))):
        pass


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
        sorted(file.name for file in path.iterdir() if file.name not in STATE_FILES)
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


def load_state(path: Path, like: Tree) -> tuple[Tree, dict[str, Any]]:
    """(state, meta) of a committed step, in the structure of `like`.

    Of a leaf of `like` that ranks hold in parts, this rank reads its own: a state does not say how
    many ranks wrote it. InputError if a byte, name, shape or dtype differs.
    """
    meta, tensors = _unharmed(path)
    wanted = dict(tree.items(like))
    unmatched = sorted(set(tensors) ^ set(wanted))
    if unmatched:
        raise InputError(
            f"checkpoint: {path} and this program differ in {unmatched[0]} (and "
            f"{len(unmatched) - 1} more); it is of another program"
        )
    for name, leaf in wanted.items():
        saved = tensors[name]
        if saved.shape != leaf.shape or saved.dtype != leaf.dtype:
            raise InputError(
                f"checkpoint: {path} holds {name} {saved.dtype}{list(saved.shape)}, expected "
                f"{leaf.dtype}{list(leaf.shape)}"
            )

    # clones, because a memory-mapped file aligns tensors otherwise than a fresh one, and kernels
    # then round otherwise
    def read(name: str, leaf: Tensor) -> Tensor:
        if is_sharded(leaf):
            return cut_part(tensors[name].to(leaf.device), placed_of(leaf))
        return tensors[name].clone().to(leaf.device)

    return tree.rebuild(like, [read(name, leaf) for name, leaf in wanted.items()]), meta


def load_part(path: Path, name: str) -> dict[str, Tensor]:
    """Tensors of one part of a state, such as "trainable", by their paths in it; InputError if a
    byte differs."""
    _, tensors = _unharmed(path)
    return {
        key.removeprefix(f"{name}."): x.clone()
        for key, x in tensors.items()
        if key.startswith(f"{name}.")
    }


def _unharmed(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(meta, tensors by path) of a state whose bytes are those that were written."""
    try:
        meta = unsealed(json.loads((path / "state.json").read_bytes()))
        with (path / "state.safetensors").open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"checkpoint: {path} can't be read ({error}); remove it to continue from the step "
            "before"
        ) from None
    if digest != meta.get("sha256"):
        raise InputError(
            f"checkpoint: {path / 'state.safetensors'} does not match its sha256; remove {path} "
            "to continue from the step before"
        )
    return meta, load_tensors(path / "state.safetensors")
