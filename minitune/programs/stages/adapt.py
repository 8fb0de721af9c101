"""Stages that say what trains, or take another model."""

from typing import ClassVar, Literal

import msgspec
import torch

from minitune import tree
from minitune.algorithms.objective import split_trainable
from minitune.errors import InputError
from minitune.lora import Lora
from minitune.programs.loading import ModelSource, abstract_state, load, say_widening
from minitune.programs.offloading import require_frozen
from minitune.programs.stages.base import BaseStage
from minitune.programs.state import AbstractState, PipelineState
from minitune.types import Fraction, Params, PositiveFloat, PositiveInt


def _stored(state: PipelineState, globs: tuple[str, ...]) -> Params:
    """Weights that train whole in the dtype of the disk: of each what this rank holds."""
    stored, cut = state.loaded.stored, state.cut
    names = tree.select(state.loaded.params, globs, "full: weights")
    return {name: cut(name, stored[name]) for name in names}


def _require_plain(whole: frozenset[str], abstract: AbstractState, who: str) -> None:
    """InputError for weights that are to train whole and are quantized, adapted or off the device.
    who: what trains them.
    """
    odd = sorted(whole & (abstract.quantized | abstract.adapted))
    if odd:
        kind = "quantized" if odd[0] in abstract.quantized else "adapted by a delta"
        raise InputError(
            f"stages: {who} is to train {odd[0]}, which is {kind}, expected a plain weight; narrow "
            "the globs of what trains whole, or adapt it by the targets of a lora stage"
        )
    require_frozen(whole, abstract.offloaded, who)


class LoraStage(BaseStage, frozen=True, kw_only=True, tag="lora"):
    """Put fresh low-rank deltas on the weights that the targets match; what trains afterwards is
    the deltas.
    """

    shards: ClassVar[bool] = True

    rank: PositiveInt  # r, rows of a and columns of b: more can learn more, and take more memory
    # the change of a weight is (alpha / rank) b a (Hu et al. 2021, arXiv 2106.09685, section 4.1)
    alpha: PositiveFloat
    targets: tuple[str, ...]  # globs of the weights that get deltas: ["*_proj.weight"]
    # glob -> another rank for the targets that it matches
    ranks: dict[str, PositiveInt] = msgspec.field(default_factory=dict)
    rslora: bool = False  # scale by alpha / sqrt(rank) in place of alpha / rank
    dora: bool = False  # train the length of every row apart from its direction
    # share of a delta's inputs that a training step sets to zero (Hu et al. 2021, table 11)
    dropout: Fraction = 0.0
    # globs of weights to train whole with the deltas: norms, embeddings
    train: tuple[str, ...] = ()

    @property
    def rule(self) -> Lora:
        """Rule that the deltas follow."""
        how = self.ranks, self.rslora, self.dora, self.dropout
        return Lora(self.rank, self.alpha, self.targets, *how)

    def check(self, abstract: AbstractState) -> AbstractState:
        """InputError unless the targets match linear weights, `train` matches others, and there are
        no deltas yet.
        """
        adapted = frozenset(self.rule.names(abstract.params))
        whole = (
            frozenset(tree.select(abstract.params, self.train, "lora: train"))
            if self.train
            else frozenset()
        )
        _require_plain(whole, abstract, self.label)
        self._refuse_wide(abstract, adapted)
        if abstract.adapted:
            raise InputError(
                f"stages: {self.label} finds deltas on the model already, expected none; drop the "
                "stage or model.deltas"
            )
        self._refuse_both(adapted, whole)
        return abstract._replace(adapted=adapted, lora=self.rule, whole=abstract.whole | whole)

    def _refuse_wide(self, abstract: AbstractState, adapted: frozenset[str]) -> None:
        rule = self.rule
        for name in sorted(adapted):
            rank, shape = rule.rank_of(name), list(abstract.params[name].shape)
            if rank > max(shape):
                raise InputError(
                    f"stages: {self.label} has rank {rank} for {name} of shape {shape}, expected "
                    f"at most {max(shape)}; lower the rank"
                )

    def _refuse_both(self, adapted: frozenset[str], whole: frozenset[str]) -> None:
        both = sorted(adapted & whole)
        if both:
            raise InputError(
                f"stages: {self.label} adapts {both[0]} and trains it whole as well, expected "
                "one; narrow targets or train"
            )

    def run(self, state: PipelineState) -> PipelineState:
        """State with trainable deltas."""
        params, trainable, rule = state.loaded.params, state.loaded.trainable, self.rule
        if self.train:
            params, whole = split_trainable(params, self.train, _stored(state, self.train))
            trainable = {**trainable, **whole}
        deltas = rule.init(state.loaded.params, state.seed)
        n_trained = sum(leaf.numel() for leaf in tree.leaves({**trainable, **deltas}))
        n_all = sum(w.shape.numel() for w in params.values())
        state.log.say(
            f"{self.label}: rank {self.rank} on {len(deltas)} weights, {n_trained:,} of {n_all:,} "
            "parameters train"
        )
        return state.with_model(params=params, lora=rule, trainable={**trainable, **deltas})


class Full(BaseStage, frozen=True, kw_only=True, tag="full"):
    """Train the weights that the globs match whole, in place of the loaded ones."""

    shards: ClassVar[bool] = True

    weights: tuple[str, ...] = ("*",)  # globs of the weights to train
    # of what trains; bfloat16 is rounded at random, so that small steps add up
    dtype: Literal["float32", "bfloat16"] = "float32"

    def check(self, abstract: AbstractState) -> AbstractState:
        """InputError unless the globs match dense weights."""
        names = frozenset(tree.select(abstract.params, self.weights, "full: weights"))
        _require_plain(names, abstract, self.label)
        return abstract._replace(whole=abstract.whole | names)

    def run(self, state: PipelineState) -> PipelineState:
        """State with trainable weights."""
        loaded, dtype = state.loaded, getattr(torch, self.dtype)
        stored = _stored(state, self.weights)
        params, whole = split_trainable(loaded.params, self.weights, stored, dtype)
        n_trained, n_all = (
            sum(w.numel() for w in tree.leaves(whole)),
            sum(w.shape.numel() for w in params.values()),
        )
        state.log.say(
            f"{self.label}: {len(whole)} weights, {n_trained:,} of {n_all:,} parameters train"
        )
        say_widening(state.log, self.label, whole)
        return state.with_model(params=params, trainable={**state.loaded.trainable, **whole})


class Load(BaseStage, frozen=True, kw_only=True, tag="load"):
    """Go on with another model; path = "run/NAME" is what a save stage of this program called NAME
    has written.
    """

    shards: ClassVar[bool] = True

    model: ModelSource  # the model to go on with

    def check(self, abstract: AbstractState) -> AbstractState:
        """InputError unless the model is there, or a stage before writes it."""
        return abstract_state(self.model, abstract)

    def run(self, state: PipelineState) -> PipelineState:
        """State with the other model and nothing to train yet."""
        state.log.say(f"{self.label}: {self.model.path or self.model.config}")
        first_rule = state.first_rules.get(self.label)
        sharding = state.sharding
        loaded = load(self.model, state.folder, state.seed, first_rule, state.log, sharding)
        say_widening(state.log, self.label, loaded.params)
        return state._replace(loaded=loaded, quantization=None, fake=None)
