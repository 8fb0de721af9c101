"""Results of the harness as plain numbers by task, and whether an error in it is of the model."""

from collections.abc import Mapping
from typing import Any


def is_ours(error: BaseException) -> bool:
    """True for an error that arose while the model scored or answered: no task file is at fault."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").startswith("minitune.inference"):
            return True
        trace = trace.tb_next
    return False


def plain_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of what simple_evaluate returned, by task (or group of tasks) and metric."""

    def metrics(row: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
        cells = {tuple(key.split(",", 1)): value for key, value in row.items() if "," in key}
        errors = {key: value if isinstance(value, float) else None for key, value in cells.items()}
        return {
            name if rule == "none" else f"{name},{rule}": {
                "value": float(value),
                "stderr": errors.get((f"{name}_stderr", rule)),
            }
            for (name, rule), value in cells.items()
            if not name.endswith("_stderr")
        }

    return {
        name: {
            "metrics": metrics(row),
            "n_samples": results["n-samples"].get(name, {}).get("effective"),
            "n_shots": results["n-shot"].get(name),
            "version": results["versions"].get(name),
        }
        for name, row in {**results["results"], **results.get("groups", {})}.items()
    }
