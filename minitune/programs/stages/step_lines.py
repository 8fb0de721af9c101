"""Lines of a training stage while it goes on: the readings of a step, and held-out losses."""

from collections.abc import Mapping, Sequence

from minitune.programs.log import Log
from minitune.programs.progress import Number, Progress
from minitune.programs.stages.loop_state import LoopState, Row


def show_step(
    progress: Progress,
    step: int,
    rows: Sequence[Row],
    rates: Mapping[str, Number],
    loop: LoopState,
) -> None:
    """Show the readings of a step: of the adapter with the lowest loss, which is named, where many
    train."""
    best = min(rows, key=lambda row: row["loss"])
    n_skipped = min(loop.n_skipped)
    adapter = {"adapter": int(best["adapter"])} if len(rows) > 1 else {}
    skipped = {"skipped": n_skipped} if n_skipped else {}
    readings = {"loss": best["loss"], **adapter, "lr": best["lr"], **skipped, **rates}
    progress.update(step, readings)


def say_heldout(log: Log, label: str, loop: LoopState, nats: Sequence[float]) -> None:
    """Say the held-out losses of an evaluation, and which is the best so far."""
    losses = ", ".join(f"{loss:.4f}" for loss in nats)
    finite = [(best, i) for i, best in enumerate(loop.best_nats) if best is not None]
    what = "losses" if len(nats) > 1 else "loss"
    said = f"{label} step {loop.step}: held-out {what} {losses}"
    if not finite:
        log.say(f"{said}; none was finite yet")
        return
    best, i = min(finite)
    whose = f" of adapter {i}" if len(nats) > 1 else ""
    log.say(f"{said}; the best so far is {best:.4f}{whose} at step {loop.best_step[i]}")
