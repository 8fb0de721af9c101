"""Lines that a training stage says before its first step: epochs, the learning rate, the memory of
a step, and what looks unintended.
"""

from collections.abc import Iterator

from torch import Tensor

from minitune.models.model import Model
from minitune.programs.learning_rates import ADAM, rate_by_size
from minitune.programs.stages.batches import TokenizedTable, tokenized
from minitune.programs.stages.training_stage import TrainingStage
from minitune.programs.state import AbstractState, PipelineState

MANY_EPOCHS = 20  # beyond which a stage is told that it will learn its rows by heart
# A rate beyond so many times that of its size diverges on a large model, one of this width or more.
HIGH_RATE, LARGE_WIDTH = 4, 512


def n_steps(stage: TrainingStage, epochs: float | None, n_rows: int) -> int:
    """Optimizer steps of a stage, counted where it gives epochs, of n_rows rows (or pairs) each."""
    if epochs is None:
        return stage.steps
    return max(1, -(-round(epochs * n_rows) // stage.batch_size))


def prepare(stage: TrainingStage, abstract: AbstractState, epochs: float | None) -> list[str]:
    """Notes on the data of a stage and on its steps; InputError for a malformed row."""
    table = tokenized(abstract, stage.data)
    seq_len = abstract.data[stage.data].max_seq_len
    steps = n_steps(stage, epochs, table.n_rows)
    of_steps = notes(stage, steps, table, abstract.model, seq_len)
    lines = [table.description, *of_steps]
    lines.extend(rate_notes(stage, abstract.model, bool(abstract.whole)))
    if stage.evaluate is not None:
        lines.append(tokenized(abstract, stage.evaluate.data).description)
    return lines


def say(stage: TrainingStage, state: PipelineState, steps: int, table: TokenizedTable) -> None:
    """Say the notes on a stage that begins."""
    loaded, seq_len = state.loaded, state.data[stage.data].max_seq_len
    trains_whole = any(isinstance(leaf, Tensor) for leaf in loaded.trainable.values())
    of_steps = notes(stage, steps, table, loaded.model, seq_len)
    for line in (*of_steps, *rate_notes(stage, loaded.model, trains_whole)):
        state.log.say(f"{stage.label}: {line}")


def notes(
    stage: TrainingStage,
    steps: int,
    table: TokenizedTable,
    model: Model,
    seq_len: int,
) -> list[str]:
    """Lines on epochs, on a warm-up that does not end, and on rows beyond the model's positions."""
    warmup = stage.schedule.warmup_steps
    kind = "pairs" if stage.loss.compares_answers else "rows"
    n_rows, batch_size = table.n_rows, stage.batch_size
    n_epochs, max_positions = steps * batch_size / n_rows, model.config.max_positions
    lines = [
        f"one epoch is {n_rows:,} {kind}, {n_rows / batch_size:,.4g} steps of {batch_size}: "
        f"{steps:,} steps are {n_epochs:,.4g} epochs"
    ]
    if n_epochs > MANY_EPOCHS:
        lines.append(
            f"more than {MANY_EPOCHS} epochs learn {kind} by heart, and held-out loss rises: "
            f"{MANY_EPOCHS} would be {n_steps(stage, float(MANY_EPOCHS), n_rows):,} steps; "
            f"lower {stage.label}.steps or epochs"
        )
    if warmup >= steps:
        lines.append(
            f"warm-up takes schedule.warmup_steps = {warmup:,} of {steps:,} steps: "
            f"the learning rate ends at {steps / warmup:.3g} of its peak"
        )
    if seq_len > max_positions:
        lines.append(
            f"data.{stage.data}.seq_len = {seq_len:,} is beyond the {max_positions:,} "
            "positions that the model was made for (max_position_embeddings); "
            f"the longest document has {table.longest:,} tokens"
        )
    return lines


def rate_notes(stage: TrainingStage, model: Model, trains_whole: bool) -> Iterator[str]:
    """Yield a line on a learning rate that is the one of the model's size, or far above that."""
    optimizer, width = stage.optimizer, model.config.d_model
    if optimizer.__struct_config__.tag not in ADAM or stage.sweep is not None:
        return
    usual = rate_by_size(model, trains_whole)
    by_size = f'{usual:g}, which lr = "auto" takes for a {model.family.name} {width:,} wide'
    if optimizer.lr == usual:
        yield f"the learning rate is {by_size}"
    elif optimizer.lr > HIGH_RATE * usual and width >= LARGE_WIDTH:
        yield (
            f"the learning rate {optimizer.lr:g} is {optimizer.lr / usual:,.0f} times {by_size}: "
            f"training may diverge; lower {stage.label}.optimizer.lr"
        )
