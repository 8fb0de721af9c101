"""Model of a training stage: its blocks compiled, and computed again in the backward."""

import re

from minitune import hardware
from minitune.algorithms.objective import forward_params
from minitune.autodiff import offload
from minitune.errors import InputError
from minitune.models.compile import wrap
from minitune.models.model import Model
from minitune.planning import activations
from minitune.programs.stages.training_stage import TrainingStage
from minitune.programs.state import PipelineState
from minitune.tree import device_of
from minitune.types import Params

# value of remat: blocks are computed again, and their inputs are kept in the host's memory
HOST = "host"
MEMORY = re.compile(r"(\d+(?:\.\d+)?) ?([KMG])iB")  # value of remat such as "8 GiB"


def check_remat(label: str, remat: bool | str) -> None:
    """InputError for a value of remat that means nothing."""
    if isinstance(remat, str) and remat != HOST and not MEMORY.fullmatch(remat):
        known = "true, false, 'host', or memory such as '8 GiB'"
        raise InputError(f"stages: {label} has remat = {remat!r}, expected {known}")


def transformed(
    stage: TrainingStage,
    state: PipelineState,
    n_rows: int,
    compiled: bool | None,
    remat: bool | str,
) -> Model:
    """Model whose blocks are compiled and computed again as `compiled` and `remat` of a stage say.

    n_rows: that go through it together in a micro-batch.
    """
    loaded, model = state.loaded, state.loaded.model
    device = device_of(loaded.params, loaded.trainable)
    if compiled or (compiled is None and hardware.capabilities(device).compiles):
        model = model._replace(block_transform=wrap(state.log.say))
    adapted = forward_params(loaded.params, loaded.trainable, loaded.lora, n_rows)
    n_again = n_remat(remat, model, adapted, n_rows, state.data[stage.data].max_seq_len)
    if remat == HOST and hardware.capabilities(device).streams:
        model = model._replace(remat=offload.remat(offload.side_stream(device)))
    elif remat == HOST:
        line = f"remat = 'host' is remat = true on {device.type}, which sends nothing to the host"
        state.log.say(f"{stage.label}: {line}")
    elif isinstance(remat, str):
        n_blocks = model.config.n_layers
        line = f"{n_again} of {n_blocks} blocks are computed again to stay within {remat}"
        state.log.say(f"{stage.label}: {line}")
    return model._replace(n_remat=n_again)


def n_remat(remat: bool | str, model: Model, params: Params, n_rows: int, n_tokens: int) -> int:
    """Number of blocks to compute again in the backward of n_rows of n_tokens.

    InputError for too small a budget.
    """
    if remat == HOST:
        return model.config.n_layers
    if not isinstance(remat, str):
        return model.config.n_layers if remat else 0
    number, unit = MEMORY.findall(remat)[0]
    n_bytes = int(float(number) * 2 ** {"K": 10, "M": 20, "G": 30}[unit])
    return activations.n_remat(model, params, n_rows, n_tokens, n_bytes)
