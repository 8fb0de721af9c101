"""State that flows through the stages of a program, and what is known of it before anything is
loaded.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from minitune import tree
from minitune.checkpoint.state_writer import StateWriter
from minitune.data.source import Source
from minitune.data.token_store import OnSample, no_one
from minitune.io.results import Result
from minitune.lora import Lora
from minitune.models.model import Model
from minitune.programs.ended import Ended
from minitune.programs.log import Log
from minitune.programs.offloading import NO_SLICES, Offloading
from minitune.programs.profiling.profile import Profile
from minitune.programs.sharding import CutWeight, Sharding, cutting, whole_on_host
from minitune.programs.signals import StopSignals
from minitune.quant.rules import Quantization
from minitune.quant.schemes import dequantize
from minitune.sharding.offloaded import FileSlice
from minitune.sharding.ranks import ALONE, Ranks
from minitune.text.served import stop_ids
from minitune.text.template import Template
from minitune.text.tokenizer import Tokenizer
from minitune.tree import Tree, device_of
from minitune.types import Params, Trainable

MAX_ROWS = 64  # of an evaluation or a generation that no program sets
DEFAULT_TOKENS = 8192  # at once, in a program without a training step


class LoadedModel(NamedTuple):
    """Model with its weights, tokenizer and deltas, as the stages work on it."""

    model: Model
    params: Params
    # weights in the dtype of the disk, which is what a save goes back to: dense, or as codes where
    # the folder has them so and a stage keeps them
    stored: Params
    source: Path | None  # the Hugging Face folder that the weights came from
    tokenizer_folder: Path
    tokenizer: Tokenizer
    template: Template
    lora: Lora | None
    trainable: Trainable
    end_ids: Sequence[int] = ()  # that generation_config.json ends an answer at
    offloading: Offloading | None = None  # of frozen blocks that are kept off the device

    def placed(
        self,
        name: str,
        w: Tree,
        dtype: torch.dtype | None = None,
        slices: Mapping[str, FileSlice] = NO_SLICES,
    ) -> Tree:
        """New leaf of a weight where this model keeps it, in a dtype or its own: on the device, or
        off it; slices: files that hold its tensors.
        """
        if self.offloading is not None and name in self.offloading.names:
            return self.offloading.leaf(name, w, dtype, slices)
        device = device_of(self.params, self.trainable)
        return tree.map(lambda x: x.to(device, dtype), w)

    def dense(self, name: str) -> Tensor:
        """Stored weight in floating point, codes as what they stand for."""
        w = self.stored[name]
        return w if isinstance(w, Tensor) else dequantize(w, torch.bfloat16)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer, by template, tokenizer and generation_config.json together."""
        ends = stop_ids(self.tokenizer, self.template)
        return [*ends, *(i for i in self.end_ids if i not in ends)]


class PipelineState(NamedTuple):
    """State that flows through the stages of a program."""

    seed: int
    folder: Path  # the run folder, runs/<name>
    log: Log
    stopping: StopSignals  # called, it says whether a signal has asked for the end
    data: Mapping[str, Source]
    records: Mapping[str, dict[str, Any]]  # by stage name: what summary.json is made of
    loaded: LoadedModel
    quantization: Quantization | None = None  # what the quantized weights of params were made with
    fake: Quantization | None = None  # what weights that train are rounded to in the forward
    tokens_at_once: int | None = None  # of the smallest training step of the program, if it has one
    # by the stage that loads a model, "" for the program's: how its weights are quantized at once
    first_rules: Mapping[str, Quantization] = MappingProxyType({})
    ended: Mapping[str, Ended] = MappingProxyType({})  # training stages that the user has ended
    profile: Profile | None = None  # steps of each training stage that are recorded
    # stages of the program by label, in order
    stages: Mapping[str, Any] = MappingProxyType({})
    ranks: Ranks = ALONE  # processes that share out the rows; the first one logs and writes
    sharding: Sharding | None = None  # how they share the weights; None: each holds all
    state_writer: StateWriter | None = None  # of the stage that trains, on a rank that saves

    def is_stopping(self) -> bool:
        """True if a signal has asked any rank for the end; every rank asks at the same place."""
        return self.ranks.any(self.stopping())

    def stoppable(self, step: int, folder: Path) -> AbstractContextManager[None]:
        """Context that a signal ends at once with Stopped; in one of several ranks, what is done in
        it asks is_stopping instead, so that all end at the same place.
        """
        return self.stopping.at_once(step, folder) if self.ranks.size == 1 else nullcontext()

    @property
    def savers(self) -> Ranks | None:
        """Ranks that save and load states together, or None for a rank that leaves it to the first.

        All do where each holds a part of the weights; otherwise the first one alone, as a run of
        one process.
        """
        if self.sharding is not None:
            return self.ranks
        return ALONE if self.ranks.is_first else None

    @property
    def cut(self) -> CutWeight:
        """Function that gives what this rank holds of a weight on the host, by its name."""
        return cutting(self.sharding, self.loaded.model.config)

    def on_host(self) -> "PipelineState":
        """State whose stored and quantized weights are whole in the first rank's memory, for
        formats that are written from whole models; every rank calls it. Its model has whole rows:
        the first rank alone runs it.
        """
        if self.sharding is None:
            return self
        params, alone = self.loaded.params, self.loaded.model._replace(shares=None)
        quantized = {name: w for name, w in params.items() if not isinstance(w, Tensor)}
        codes = whole_on_host(quantized, self.ranks)
        stored = whole_on_host(self.loaded.stored, self.ranks)
        return self.with_model(model=alone, params={**params, **codes}, stored=stored)

    def rows_at_once(self, n_tokens: int) -> int:
        """Rows of n_tokens for a forward that fits where the training steps fit."""
        return min(MAX_ROWS, max(1, (self.tokens_at_once or DEFAULT_TOKENS) // n_tokens))

    def record(self, label: str, values: dict[str, Any]) -> "PipelineState":
        """This state with one more stage's record."""
        return self._replace(records={**self.records, label: values})

    def with_model(self, **changes: Any) -> "PipelineState":
        """This state with some of its model's fields replaced."""
        return self._replace(loaded=self.loaded._replace(**changes))


class SavedModel(NamedTuple):
    """Model that a stage will have written, with what its folder will hold for texts."""

    model: Model
    tokenizer: Tokenizer | None
    template: Template | None


class AbstractState(NamedTuple):
    """State as it is known before a weight is loaded: each stage checks itself against it and
    returns the next.
    """

    data: Mapping[str, Source]
    model: Model
    params: Params  # on the meta device
    adapted: frozenset[str] = frozenset()  # weights with a delta
    lora: Lora | None = None  # the rule that the deltas follow
    whole: frozenset[str] = frozenset()  # weights that train whole
    offloaded: frozenset[str] = frozenset()  # frozen weights that are kept off the device
    quantized: frozenset[str] = frozenset()
    codes: Params = MappingProxyType({})  # the quantized weights, on the meta device
    # how the weights were quantized that loaded deltas were trained on
    trained_over: Mapping[str, Any] | None = None
    # weights have changed since they were loaded, so that no folder holds them
    merged: bool = False
    # by run/... path: the models that stages before will have written
    saved: Mapping[str, SavedModel] = MappingProxyType({})
    # by path in the program: what save and export stages before will have written, by their word
    written: Mapping[str, str] = MappingProxyType({})
    tokenizer: Tokenizer | None = None  # of the model; None before there is one
    template: Template | None = None
    # by the name of a table: what is called with the number of its samples while it is tokenized
    on_sample: Callable[[str], OnSample] = lambda _: no_one

    def text(self) -> tuple[Tokenizer, Template]:
        """Tokenizer and chat template of the model."""
        assert self.tokenizer is not None, "a program has a model before its first stage"
        assert self.template is not None, "a tokenizer comes with a template"
        return self.tokenizer, self.template


def trainable_like(abstract: AbstractState, narrow: Set[str] = frozenset()) -> Trainable:
    """Tree that trains, on the meta device; narrow: weights that train whole in bfloat16."""
    whole = {}
    for name in abstract.whole:
        whole[name] = abstract.params[name].to(torch.bfloat16 if name in narrow else torch.float32)
    if abstract.lora is None:
        return whole
    return {**abstract.lora.like(abstract.params), **whole}


@runtime_checkable
class PipelineStage(Protocol):
    """Interface of a stage, as programs run it."""

    observes: ClassVar[bool]  # it leaves the model as it is
    gathers: ClassVar[bool]  # it observes weights that all ranks of a plan put together
    shards: ClassVar[bool]  # it works on weights of which each rank holds a part

    @property
    def label(self) -> str:
        """Name in overrides, records and messages."""
        ...

    def check(self, abstract: AbstractState) -> AbstractState:
        """Abstract state after this stage; InputError for what would stop it later."""
        ...

    def run(self, state: PipelineState) -> PipelineState:
        """State after this stage."""
        ...


@runtime_checkable
class DataStage(Protocol):
    """Stage that reads a [data] table, which is tokenized for it before a weight is read."""

    def prepare(self, abstract: AbstractState) -> list[str]:
        """Notes on the data that the stage will use, given the state before it.

        InputError for a row that would stop the stage. Tokens stay in the cache for it.
        """
        ...


@runtime_checkable
class RankedStage(Protocol):
    """Stage that is another one where several processes run it."""

    def on_ranks(self, n_ranks: int, *, is_sharded: bool) -> PipelineStage:
        """Stage as n_ranks processes run it together, which share the weights if is_sharded;
        InputError for one that they can't.
        """
        ...


@runtime_checkable
class WritingStage(Protocol):
    """Stage that writes something for after the run."""

    @property
    def result(self) -> Result:
        """Path of what is written."""
        ...
