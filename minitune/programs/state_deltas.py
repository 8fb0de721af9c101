"""Deltas from a folder that a person may name: a PEFT adapter, a run, or a training state."""

from pathlib import Path

import torch
from torch import Tensor

from minitune import tree
from minitune.checkpoint.fingerprint import folder_fingerprint
from minitune.checkpoint.state import load_part
from minitune.errors import InputError
from minitune.interop.peft.layout import CONFIG, Base
from minitune.interop.peft.load import load_adapter
from minitune.io.paths import locate
from minitune.io.results import require_unharmed
from minitune.lora import Lora, check_deltas
from minitune.programs.trained_state import TrainedState, is_run, trained_state
from minitune.types import Delta, Params, Trainable

RULE = ("rank", "alpha", "targets", "ranks", "rslora", "dora")


def deltas_folder(path: Path) -> Path:
    """Folder that holds deltas: that itself, or of a run the adapter it saved, else its newest
    state."""
    if not is_run(path):
        return path
    saved = sorted(config.parent for config in path.glob(f"*/{CONFIG}"))
    if len(saved) == 1 and (path / "summary.json").is_file():
        return saved[0]
    state = trained_state(path)
    return path if state is None else state.folder


def open_deltas(path: Path, params: Params) -> tuple[Lora | None, Trainable, Base | None]:
    """(rule, deltas and whole weights, their base) of an adapter, a run or a training state.

    params: those of the model that they are for. InputError for what can't be put on a model.
    """
    folder = deltas_folder(path)
    state = trained_state(folder)
    if state is None:
        return load_adapter(folder, names=params)
    return _from_state(state, params)


def deltas_on(
    name: str, run: Path, base_folder: Path | None, params: Params, device: torch.device
) -> tuple[Lora | None, Trainable]:
    """(rule, deltas and whole weights on a device) of a folder by its name in a program.

    InputError for deltas that do not fit params, and for those of another base than base_folder.
    """
    folder = locate(name, run)
    require_unharmed(deltas_folder(folder))
    rule, trainable, base = open_deltas(folder, params)
    check_deltas(params, trainable, name)
    if base is not None and base.fingerprint is not None and base_folder is not None:
        fingerprint = folder_fingerprint(base_folder)
        if fingerprint != base.fingerprint:
            raise InputError(
                f"loading: the deltas in {name} were trained on {base.path} "
                f"({base.fingerprint[:12]}), whose weights are not those of {base_folder} "
                f"({fingerprint[:12]}), expected the same base; point [model] path to it"
            )
    return rule, tree.map(lambda x: x.to(device), trainable)


def _from_state(state: TrainedState, params: Params) -> tuple[Lora | None, Trainable, Base]:
    quantized = state.quantize
    quantization = {"scheme": quantized["scheme"]} if quantized is not None else None
    base = Base(state.base, quantization=quantization)
    table = state.lora
    rule = None
    if table is not None:
        given = {key: table[key] for key in RULE if key in table}
        rule = Lora(**{**given, "targets": tuple(table["targets"])})
    tensors = load_part(state.folder, "trainable")
    adapted = rule.names(params) if rule is not None else []
    trainable: dict[str, Tensor | Delta] = {}
    for name in adapted:
        has = [part for part in Delta._fields if f"{name}.{part}" in tensors]
        trainable[name] = Delta(**{part: tensors.pop(f"{name}.{part}") for part in has})
    return rule, {**trainable, **tensors}, base
