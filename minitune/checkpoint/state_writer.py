"""Writer of the training states of a stage, which may go on while steps are taken.

A save in the background begins with a copy of the state in memory of the host, because the next
step writes over the tensors. A thread then does what `save_state` does: its messages to other ranks
go through a process group of their own, so they can't be taken for those of a step.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from minitune import hardware, tree
from minitune.checkpoint.sharded_state import OwnPart, OwnParts, parts_to_write
from minitune.checkpoint.shared_outcome import SharedOutcome
from minitune.checkpoint.state import save_parts
from minitune.sharding.ranks import Ranks
from minitune.tree import Tree


@final
class StateWriter:
    """Saves of training states, one at a time; all ranks that save make the same calls."""

    def __init__(self, ranks: Ranks, apart: Ranks, *, in_background: bool) -> None:
        """apart: the same ranks as the writing thread talks to them."""
        self._ranks, self._apart, self._in_background = ranks, apart, in_background
        self._memory: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        folder: Path,
        step: int,
        state: Tree,
        meta: Mapping[str, Any],
        keep: int | None,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        """Commit a state as `save_state` does, once the one before it is committed: at once, or in
        the background.

        The tensors of the state may be written over when this returns. before: what has to be on
        the disk before the state is; the first failure of either is raised here, by `settle` or by
        `wait`.
        """
        self.wait()
        parts = parts_to_write(state, self._ranks)
        if not self._in_background:
            self._commit(folder, step, parts, meta, keep, before)
            return
        parts, is_copied = self._copied(parts)
        work = partial(self._commit, folder, step, parts, meta, keep, before)
        self._thread = threading.Thread(
            target=self._run, args=(is_copied, work), name="save", daemon=True
        )
        self._thread.start()

    def settle(self) -> None:
        """Raise the error of a save that has ended on all ranks; wait for none that goes on.

        Every rank calls it at the same places, so that all of them raise at the same one.
        """
        if self._thread is not None and not self._ranks.any(self._thread.is_alive()):
            self.wait()

    def wait(self) -> None:
        """Wait until all that was to be saved is committed; raises the error of a save."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def _run(self, is_copied: Callable[[], object], work: Callable[[], object]) -> None:
        try:
            is_copied()
            work()
        except BaseException as error:
            self._error = error

    def _commit(
        self,
        folder: Path,
        step: int,
        parts: OwnParts,
        meta: Mapping[str, Any],
        keep: int | None,
        before: Callable[[], object],
    ) -> None:
        with SharedOutcome(self._apart).block():
            before()
        save_parts(folder, step, parts, meta, keep, self._apart)

    def _copied(self, own: OwnParts) -> tuple[OwnParts, Callable[[], None]]:
        """(copies in memory that earlier copies were made in, function that waits for them)."""
        parts: dict[str, OwnPart] = {}
        for name, part in own.parts.items():
            streams = hardware.capabilities(part.tensor.device).streams
            memory = self._memory_for(name, part.tensor, pinned=streams)
            copy = tree.donate(memory, part.tensor, non_blocking=streams)
            parts[name] = part._replace(tensor=copy)
        devices = {part.tensor.device for part in own.parts.values()}
        waits = [hardware.queued(device) for device in devices]

        def wait_for_copies() -> None:
            for wait in waits:
                wait()

        return own._replace(parts=parts), wait_for_copies

    def _memory_for(self, name: str, like: Tensor, *, pinned: bool) -> Tensor:
        known = self._memory.get(name)
        if known is None or known.shape != like.shape or known.dtype != like.dtype:
            known = torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)
            self._memory[name] = known
        return known


@contextmanager
def state_writer(ranks: Ranks | None, *, in_background: bool) -> Iterator[StateWriter | None]:
    """Writer for ranks that save together, None for a rank that leaves it to others. What was begun
    is committed when the block ends, also by an error, but not by Ctrl-C.
    """
    if ranks is None:
        yield None
        return
    with ranks.apart() if in_background else nullcontext(ranks) as apart:
        writer = StateWriter(ranks, apart, in_background=in_background)
        try:
            yield writer
        except Exception:
            with suppress(Exception):
                writer.wait()
            raise
        writer.wait()
