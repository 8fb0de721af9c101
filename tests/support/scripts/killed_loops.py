"""Kill a training loop by SIGKILL at random instants and continue it, N times: killed_loops.py FOLDER N SEED.

A child takes the steps of support.numbers with a state of 64 KiB saved after each, and an evaluation after every
second; every other child saves in the background. It names every step whose save has returned on a pipe, so that it
is known what was committed when it died. Whenever a run is finished it is compared with a straight one, and a fresh
one begins. Prints counts as JSON.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import msgspec
import torch

from minitune import checkpoint
from minitune.checkpoint import state_writer
from minitune.programs.stages.training_stage import Evaluation
from support.numbers import STAGE, Numbers, train

STAGE_OF_KILLS = msgspec.structs.replace(STAGE, steps=12, evaluate=Evaluation(data="heldout", every=2))


class Large(Numbers):
    """Task whose state is large enough for a kill to come while it is written."""

    def step(self, train_state: dict, batch: torch.Tensor) -> tuple[dict, dict]:
        after, metrics = super().step(train_state, batch)
        after["trainable"]["x"] = after["trainable"]["x"].expand(2**14).contiguous()
        return after, metrics


def take_steps(folder: Path, reports: int | None = None, *, in_background: bool = False) -> tuple[list[float], list[str]]:
    """(values of the trained leaf, rows without times) of a finished loop, which saves at once or in the background."""
    save = state_writer.save_parts

    def reported(where: Path, step: int, *args: object) -> Path:
        path = save(where, step, *args)
        if reports is not None:
            os.write(reports, b"%d\n" % step)
        return path

    state_writer.save_parts = reported
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    numbers = Large(skipped=(4,))
    stage = msgspec.structs.replace(STAGE_OF_KILLS, save_in_background=in_background)
    x = train(folder, numbers, stage, torch.zeros(2**14))[0]
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    timeless = [{key: row[key] for key in row if key not in ("tokens_per_second", "mem_bytes")} for row in rows]
    return x.tolist(), [json.dumps(row) for row in timeless]


def child(folder: Path, reports: int, *, in_background: bool) -> int:
    """Process that trains in a folder."""
    pid = os.fork()
    if pid == 0:
        take_steps(folder, reports, in_background=in_background)
        os._exit(0)
    return pid


def main(root: Path, n: int, seed: int) -> dict[str, int]:
    """Counts of what was seen over n kills."""
    terminal = sys.stdout
    straight = take_steps(root / "straight")
    draw, counts = random.Random(seed), dict.fromkeys(("kills", "lost", "unreadable", "unequal", "finished"), 0)
    number = 0
    while counts["kills"] < n:
        folder = root / f"run-{number}"
        folder.mkdir(exist_ok=True)
        reader, writer = os.pipe()
        pid = child(folder, writer, in_background=counts["kills"] % 2 == 1)
        os.close(writer)
        with os.fdopen(reader) as file:
            # An instant anywhere in the run: so many steps after its start, and up to two steps' time more.
            committed = [int(line) for _, line in zip(range(draw.randrange(STAGE_OF_KILLS.steps)), file, strict=False)]
            time.sleep(draw.uniform(0, 0.01))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            committed += [int(line) for line in file]
        states = checkpoint.list_states(folder / "checkpoints/train")
        steps = [int(path.name.removeprefix("step-")) for path in states]
        counts["lost"] += bool(committed) and (not steps or steps[-1] < committed[-1])
        for state in states:
            try:
                checkpoint.load_state(state, {"trainable": {"x": torch.zeros(2**14)}})
            except ValueError:
                counts["unreadable"] += 1
        counts["kills"] += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status) or counts["kills"] == n:
            counts["finished"] += 1
            counts["unequal"] += take_steps(folder) != straight
            number += 1
    sys.stdout = terminal
    return counts


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
