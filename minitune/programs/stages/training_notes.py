"""Lines that a training stage says before its first step: epochs, and what looks unintended."""

from minitune.models.config import DecoderConfig
from minitune.programs.stages.batches import TokenizedTable
from minitune.programs.stages.training_stage import TrainingStage


def n_steps(steps: int | None, epochs: float | None, batch_size: int, n_rows: int) -> int:
    """Optimizer steps of a stage with steps or epochs; an epoch is n_rows rows (or pairs)."""
    if steps is not None:
        return steps
    assert epochs is not None, "a stage has steps or epochs"
    return max(1, -(-round(epochs * n_rows) // batch_size))


def training_notes(
    stage: TrainingStage,
    table: TokenizedTable,
    config: DecoderConfig,
    seq_len: int,
) -> list[str]:
    """Lines on epochs, on a warm-up that does not end, and on rows beyond the model's positions."""
    total, warmup = stage.n_steps, stage.schedule.warmup_steps
    kind = "pairs" if stage.loss.compares_answers else "rows"
    n_rows, batch_size = table.n_rows, stage.batch_size
    lines = [
        f"one epoch is {n_rows:,} {kind}, {n_rows / batch_size:,.4g} steps of {batch_size}: "
        f"{total:,} steps are {total * batch_size / n_rows:,.4g} epochs"
    ]
    if warmup >= total:
        lines.append(
            f"warm-up takes schedule.warmup_steps = {warmup:,} of {total:,} steps: "
            f"the learning rate ends at {total / warmup:.3g} of its peak"
        )
    if seq_len > config.max_positions:
        lines.append(
            f"data.{stage.data}.seq_len = {seq_len:,} is beyond the {config.max_positions:,} "
            "positions that the model was made for (max_position_embeddings); "
            f"the longest document has {table.longest:,} tokens"
        )
    return lines
