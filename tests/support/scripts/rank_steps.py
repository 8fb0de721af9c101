"""Steps that tests/algorithms/test_ranks.py takes on the ranks of a group, and in one process."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from minitune import tree
from minitune.algorithms.preference import preference
from minitune.algorithms.supervised import sft
from minitune.algorithms.sweep import stack, sweep_step
from minitune.lora import Lora
from minitune.losses.preference import SimPO
from minitune.losses.token import CrossEntropy
from minitune.models import Model
from minitune.models.families import llama
from minitune.optim.sgd import SGD
from minitune.sharding.ranks import ALONE, Ranks
from minitune.steps import train_step
from minitune.types import AnyBatch, Batch, Pairs, Params, Trainable
from support.models import SMALL, random_batch, random_params

RULE = Lora(rank=2, alpha=4.0, targets=("*.self_attn.*_proj.weight",))
OPTIMIZER = SGD(lr=0.5)
MODEL = Model(llama.FAMILY, SMALL)


class Case(NamedTuple):
    """One step: of which loss, on how many rows, in micro-batches of how many, with which of the rows masked."""

    loss: str  # sft, pairs or sweep
    n_rows: int
    micro_batch: int | None
    masked: tuple[int, ...]

    def batch(self) -> AnyBatch:
        rows = _masked(random_batch(SMALL, self.n_rows, 11), self.masked)
        if self.loss == "pairs":
            return Pairs(rows, random_batch(SMALL, self.n_rows, 7, seed=1))
        return tree.map(lambda x: torch.stack([x, x.flip(0)]), rows) if self.loss == "sweep" else rows


def steps(cases: list[Case], rank: int = 0, size: int = 1) -> list[dict[str, torch.Tensor]]:
    """Trees and metrics after each case's step, of which this rank takes its share."""
    ranks = ALONE if size == 1 else Ranks(rank, size)
    return [_step(case, case.batch(), ranks) for case in cases]


def steps_of_ranks(cases: list[Case]) -> list[dict[str, torch.Tensor]]:
    """The same in a process group, by the number of this rank there."""
    return steps(cases, dist.get_rank(), dist.get_world_size())


def rows_of_forwards(n_rows: int) -> list[int]:
    """Rows of each forward that this rank makes in a step whose micro-batches nobody has given a size."""
    seen = []
    objective = sft(MODEL, RULE)

    def watched(trainable: Trainable, params: Params, batch: Batch) -> Any:
        seen.append(len(batch.tokens))
        return objective(trainable, params, batch)

    params, place = random_params(SMALL), Ranks(dist.get_rank(), dist.get_world_size())
    step = train_step(watched, OPTIMIZER, ranks=place)
    step.update(params, step.init(RULE.init(params, 0)), random_batch(SMALL, n_rows, 11))
    return seen


def step_on_own_rows(parts: list[Batch]) -> dict[str, torch.Tensor]:
    """Tree and metrics after a step on rows that no other rank has."""
    rows = parts[dist.get_rank()]
    return _step(Case("sft", len(rows.tokens), 1, ()), rows, ALONE)


def _step(case: Case, batch: AnyBatch, ranks: Ranks) -> dict[str, torch.Tensor]:
    params = random_params(SMALL)
    deltas = RULE.init(params, 0)
    if case.loss == "sweep":
        rules = [RULE, RULE]
        deltas = stack([deltas, RULE.init(params, 1)])
        micro_batch = case.micro_batch or case.n_rows
        step = sweep_step(MODEL, CrossEntropy(), rules, [OPTIMIZER] * 2, micro_batch=micro_batch, ranks=ranks)
    else:
        objective = preference(MODEL, RULE, SimPO(), None) if case.loss == "pairs" else sft(MODEL, RULE)
        step = train_step(objective, OPTIMIZER, micro_batch=case.micro_batch, ranks=ranks)
    state, metrics = step.update(params, step.init(deltas), batch)
    return dict(tree.items((state.trainable, metrics)))


def _masked(rows: Batch, masked: tuple[int, ...]) -> Batch:
    keeps = torch.tensor([i not in masked for i in range(len(rows.tokens))])
    return rows._replace(loss_mask=rows.loss_mask & keeps[:, None])
