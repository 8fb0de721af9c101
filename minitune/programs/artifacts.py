"""Artifacts of a run, as trackers keep them: adapters, model folders, states of training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

from minitune.checkpoint.state import list_states
from minitune.programs.variables import hidden
from minitune.trackers.tracker import Artifact, Kept


def written(
    folder: Path,
    program: Mapping[str, Any],
    figures: Mapping[str, float],
    label: str,
    record: Mapping[str, Any],
) -> dict[Kept, Artifact]:
    """Artifacts of a stage that has ended, by what they are; none of a stage that writes nothing.

    folder: of the run; program: as it was written; figures: of the stages so far, by "STAGE/NAME".
    The metadata hold the seed, the base model, the hashes of all inputs and of what was written,
    and the figures.
    """
    paths: dict[Kept, Path] = {}
    if record.get("what") in get_args(Kept):
        paths[cast("Kept", record["what"])] = Path(record["path"])
    if record.get("steps"):
        states = list_states(folder / "checkpoints" / label)
        if states:
            paths["checkpoints"] = states[-1]
    if not paths:
        return {}
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    # paths of files, without the values of variables in them
    names = hidden(manifest["inputs"], program, manifest.get("variables", {}))
    metadata = {
        "seed": program.get("seed"),
        "base": (program.get("model") or {}).get("path"),
        "inputs": dict(zip(names, manifest["inputs"].values(), strict=True)),
        "sha256": record.get("sha256", {}),
        **figures,
    }
    is_best = any(name.endswith("/best_step") for name in figures)
    name = program.get("name")
    return {
        kept: Artifact(f"{name}-{kept}", path, metadata, is_best) for kept, path in paths.items()
    }
