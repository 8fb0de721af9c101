"""Lines that a training stage says before its first step: epochs, and what looks unintended."""

from minitune.models.config import DecoderConfig
from minitune.programs.stages.batches import TokenizedTable, tokenized
from minitune.programs.stages.training_stage import TrainingStage
from minitune.programs.state import AbstractState


def n_steps(stage: TrainingStage, epochs: float | None, n_rows: int) -> int:
    """Optimizer steps of a stage, counted where it gives epochs, of n_rows rows (or pairs) each."""
    if epochs is None:
        return stage.steps
    return max(1, -(-round(epochs * n_rows) // stage.batch_size))


def prepare(stage: TrainingStage, abstract: AbstractState, epochs: float | None) -> list[str]:
    """Notes on the data of a stage and on its steps; InputError for a malformed row."""
    table = tokenized(abstract, stage.data)
    seq_len, config = abstract.data[stage.data].seq_len, abstract.model.config
    steps = n_steps(stage, epochs, table.n_rows)
    lines = [table.description, *notes(stage, steps, table, config, seq_len)]
    if stage.evaluate is not None:
        lines.append(tokenized(abstract, stage.evaluate.data).description)
    return lines


def notes(
    stage: TrainingStage,
    steps: int,
    table: TokenizedTable,
    config: DecoderConfig,
    seq_len: int,
) -> list[str]:
    """Lines on epochs, on a warm-up that does not end, and on rows beyond the model's positions."""
    warmup = stage.schedule.warmup_steps
    kind = "pairs" if stage.loss.compares_answers else "rows"
    n_rows, batch_size = table.n_rows, stage.batch_size
    lines = [
        f"one epoch is {n_rows:,} {kind}, {n_rows / batch_size:,.4g} steps of {batch_size}: "
        f"{steps:,} steps are {steps * batch_size / n_rows:,.4g} epochs"
    ]
    if warmup >= steps:
        lines.append(
            f"warm-up takes schedule.warmup_steps = {warmup:,} of {steps:,} steps: "
            f"the learning rate ends at {steps / warmup:.3g} of its peak"
        )
    if seq_len > config.max_positions:
        lines.append(
            f"data.{stage.data}.seq_len = {seq_len:,} is beyond the {config.max_positions:,} "
            "positions that the model was made for (max_position_embeddings); "
            f"the longest document has {table.longest:,} tokens"
        )
    return lines
