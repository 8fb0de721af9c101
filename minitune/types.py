"""Nouns that every floor shares, and the one glossary of shape letters.

    B  batch (rows)        T  tokens in a row       V  vocabulary
    D  d_model             F  d_ff                  R  LoRA rank
    N  attention heads     K  key/value heads       E  d_head
    S  keys that can be attended to (cached + new)  n  labelled rows
    Ev head size of values, where it is not E

Params are flat and keep Hugging Face names and [out, in] layout:
"model.layers.0.self_attn.q_proj.weight".
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Annotated, Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from msgspec import Meta
from torch import Tensor
from typing_extensions import TypeAliasType

from minitune.hardware import to_device

# numbers in a certain range: msgspec checks them where a program, a config or a data file is
# decoded numbers that 32 bits hold
PositiveInt = Annotated[int, Meta(gt=0, le=2**31 - 1)]
NonNegativeInt = Annotated[int, Meta(ge=0, le=2**31 - 1)]
# bounds that neither infinity nor NaN is within, and whose products with float32 are finite
LARGEST = 1e30
FiniteFloat = Annotated[float, Meta(ge=-LARGEST, le=LARGEST)]
PositiveFloat = Annotated[float, Meta(gt=0.0, le=LARGEST)]
NonNegativeFloat = Annotated[float, Meta(ge=0.0, le=LARGEST)]
Epsilon = Annotated[float, Meta(ge=1e-30, le=LARGEST)]  # what is divided by in float32, so never 0
UnitInterval = Annotated[float, Meta(ge=0.0, le=1.0)]
OpenUnitInterval = Annotated[float, Meta(gt=0.0, lt=1.0)]
Fraction = Annotated[float, Meta(ge=0.0, lt=1.0)]

# opens a counter of so many things; what it gives is called when one of them is done
Counting = Callable[[int], AbstractContextManager[Callable[[], object]]]


@contextmanager
def uncounted(total: int) -> Iterator[Callable[[], object]]:
    """Counter that shows nothing."""
    yield lambda: None


class Delta(NamedTuple):
    """Low-rank change of one weight W [out, in]: W + b @ a (the rule that owns it holds the
    scale).

    With a magnitude m (DoRA) every row of the sum is rescaled to that length.
    """

    a: Float[Tensor, "R in"]
    b: Float[Tensor, "out R"]
    # length of each row of the sum (DoRA); () without, for torch.func counts None as a leaf
    m: Float[Tensor, "out"] | tuple[()] = ()


class Dropout(NamedTuple):
    """Seeds and rate by which inputs of a low-rank change are dropped (nn/dropout.py)."""

    seeds: Int[Tensor, "B"]  # of each row of tokens, for one weight
    rate: Float[Tensor, "*n"]  # share that is dropped, in [0, 1); of each of n changes
    # place in its row of the first token, where a rank has a part of the rows' tokens
    first: Int[Tensor, ""] | tuple[()] = ()
    # (first feature, number of all), where a rank has a part of the features
    part: tuple[int, int] | tuple[()] = ()


class Adapted(NamedTuple):
    """Weight and its low-rank change: it multiplies as W + b a, or with a magnitude as m * (W + b
    a) / |W + b a| by rows.

    The scale of the rule that trains the change is inside b: `lora.apply` makes such leaves, and
    nothing else scales them. Leaves a and b with one dimension more, n, hold n changes of one
    weight: each serves its n-th part of the rows.
    """

    w: Any  # a Tensor [out, in], or a QTensor
    a: Float[Tensor, "*n R in"]
    b: Float[Tensor, "*n out R"]
    m: Float[Tensor, "*n out"] | tuple[()] = ()
    dropout: Dropout | tuple[()] = ()  # of the input of a; there in training alone

    @property
    def shape(self) -> torch.Size:
        """[out, in] of the weight."""
        return self.w.shape


# These aliases keep their names where help() and inspect.signature print them.
# a leaf says how it multiplies: a Tensor, a QTensor (quantized) or an Adapted one
Params = TypeAliasType("Params", Mapping[str, Any])
Deltas = TypeAliasType("Deltas", Mapping[str, Delta])
# a tensor replaces the weight of its name, a Delta adapts it
Trainable = TypeAliasType("Trainable", Mapping[str, Tensor | Delta])
Metrics = TypeAliasType("Metrics", dict[str, Tensor])


@runtime_checkable
class AnyBatch(Protocol):
    """Tree of tensors [B, ...] that a step takes as its batch: a Batch, Pairs, or a NamedTuple of
    your own with the property `counts`.

    A step cuts every tensor along its first dimension into micro-batches, and hands them to its
    objective, which knows what the batch holds.
    """

    @property
    def counts(self) -> str:
        """Name in metrics of the objective's weight, which is what the rows are counted in:
        "target_tokens", "pairs".
        """
        ...


class Batch(NamedTuple):
    """Rows of tokens: segment_ids 0 is padding, else a document's number in its row; loss_mask:
    tokens[b, t] is a target.

    A loss_mask of numbers holds what each target counts in the loss, from 0 to 1.

    A batch may lie on the host beside weights on an accelerator, and that is where it belongs: a
    step counts its labelled tokens there and sends what each micro-batch needs. A step on a batch
    that lies on an accelerator is as right, but the host waits for every micro-batch to learn how
    many of its tokens are labelled.
    """

    tokens: Int[Tensor, "B T"]
    segment_ids: Int[Tensor, "B T"]
    loss_mask: Bool[Tensor, "B T"] | Float[Tensor, "B T"]

    @property
    def counts(self) -> str:
        """Name in metrics of the weight of an objective on them: "target_tokens"."""
        return "target_tokens"

    def target_mask(self) -> Bool[Tensor, "B T"] | Float[Tensor, "B T"]:
        """Targets that can be predicted: loss_mask, less documents' first tokens and padding."""
        follows = (self.segment_ids[:, 1:] == self.segment_ids[:, :-1]) & (
            self.segment_ids[:, 1:] > 0
        )
        nothing = torch.zeros_like(self.loss_mask)
        predicted = torch.where(follows, self.loss_mask[:, 1:], nothing[:, 1:])
        return torch.cat([nothing[:, :1], predicted], dim=1)


class Pairs(NamedTuple):
    """Answers to the same prompts, row by row; reference: summed log-probs of [chosen, rejected]
    under a frozen model, or ().
    """

    chosen: Batch
    rejected: Batch
    reference: Float[Tensor, "B 2"] | tuple[()] = ()

    @property
    def counts(self) -> str:
        """Name in metrics of the weight of an objective on them: "pairs"."""
        return "pairs"


class UnpairedBatch(NamedTuple):
    """Answers that were found desirable or not; mismatched: each prompt with the answer to another
    prompt of the data.
    """

    answers: Batch
    mismatched: Batch
    desirable: Bool[Tensor, "B"]
    # summed log-probs of [answers, mismatched] under a frozen model
    reference: Float[Tensor, "B 2"] | tuple[()] = ()

    @property
    def counts(self) -> str:
        """Name in metrics of the weight of an objective on them: "answers"."""
        return "answers"


class TeacherBatch(NamedTuple):
    """Rows with what a teacher says of every token: log-probs of its k likeliest tokens at the
    loss's temperature.
    """

    rows: Batch
    top_ids: Int[Tensor, "B T k"]
    top_logps: Float[Tensor, "B T k"]

    @property
    def counts(self) -> str:
        """Name in metrics of the weight of an objective on them: "target_tokens"."""
        return "target_tokens"


class SeededBatch(NamedTuple):
    """Rows of any kind for a step that draws at random: a row's dropout and noise follow its seed.

    Without seeds nothing is dropped and no noise is added. dropout.seeded makes these.
    """

    rows: Any  # an AnyBatch
    seeds: Int[Tensor, "B"]

    @property
    def counts(self) -> str:
        """Name in metrics of the weight of an objective on the rows."""
        return self.rows.counts


class LogProbs(NamedTuple):
    """Summed log-probs [nats] of a batch of answer pairs, and how many tokens each answer has."""

    chosen: Float[Tensor, "B"]
    rejected: Float[Tensor, "B"]
    n_chosen: Float[Tensor, "B"]
    n_rejected: Float[Tensor, "B"]


class Mean(NamedTuple):
    """Mean that is not divided yet: so that ranks and micro-batches can be summed and divided
    once.

    A scalar of each; a sweep has one for every adapter.
    """

    total: Float[Tensor, "*adapters"]
    weight: Float[Tensor, "*adapters"]

    @staticmethod
    def of(
        x: Float[Tensor, "*shape"],
        mask: Bool[Tensor, "*shape"] | Float[Tensor, "*shape"],
    ) -> "Mean":
        """Sum of x where mask, and how many; elsewhere x may hold anything, NaN included.

        A mask of numbers holds the weights that x is multiplied with already, as by
        Model.token_losses: the weight of the mean is their sum. The mask may lie on the host.
        """
        mask = to_device(mask, x.device)
        return Mean(torch.where(mask != 0, x, 0.0).sum(), mask.sum().to(x.dtype))

    def value(self) -> Float[Tensor, "*adapters"]:
        """total / weight, and 0 for an empty mean (whose total is 0)."""
        return self.total / torch.where(self.weight > 0, self.weight, 1.0)

    def weightless(self) -> "Mean":
        """Mean that counts nothing in a sum, with a gradient of zeros."""
        return Mean(self.total * 0, self.weight * 0)


class TrainState(NamedTuple):
    """Values that a step changes: the trees that train, and the optimizer's state."""

    trainable: Trainable  # of a sweep, stacked Deltas
    opt_state: Any  # a tree of tensors


class StepInit(Protocol):
    """First function of a step."""

    def __call__(self, trainable: Trainable) -> TrainState:
        """State before the first step: the tree that trains, and what the optimizer begins with."""
        ...


class StepUpdate(Protocol):
    """Second function of a step."""

    # a batch of any kind would be more than an objective promises: each takes its own
    def __call__(self, params: Params, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """(state, metrics) after one step on an AnyBatch, of the kind that the objective takes."""
        ...


class Step(NamedTuple):
    """Training step as two pure functions; steps.py makes them."""

    init: StepInit
    update: StepUpdate


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or dtype itself where that is wider: in which sums over many numbers are made."""
    return torch.promote_types(dtype, torch.float32)


def widen(x: Tensor) -> Tensor:
    """x in float32 or wider."""
    return x.to(wide_dtype(x.dtype))
