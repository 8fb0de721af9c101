"""Stages that change what a model is made of: deltas, whole weights, another model, quantized weights, merged ones."""

from itertools import islice
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from minitune import calibrate, checkpoint, objectives, paths, quant, tree
from minitune.data import batches, prepare
from minitune.io import atomic
from minitune.lora import Lora, merge_error
from minitune.stages.base import BaseStage, Positive, device_of
from minitune.types import QNF4, Delta, InputError, Params, QFloat8, QInt4, QInt8
from minitune.world import Draft, ModelSource, World, asked_data, drafted, load, say_widening

Onto = Literal["trained", "stored"]  # what deltas are merged onto: the weights they trained on, or the dense ones on disk
Dtype = Literal["float32", "bfloat16", "float16"]
CALIBRATION_ROWS = 8  # a forward
LAYOUTS: dict[type, Any] = {quant.Int8: QInt8, quant.Float8: QFloat8, quant.Int4: QInt4, quant.NF4: QNF4}


class LoraStage(BaseStage, frozen=True, kw_only=True, tag="lora"):
    """Put fresh low-rank deltas on the weights that the targets match; what trains afterwards is the deltas."""

    rank: Positive
    alpha: float
    targets: tuple[str, ...]
    ranks: dict[str, Positive] = msgspec.field(default_factory=dict)  # glob -> another rank for the targets that it matches
    rslora: bool = False  # scale by alpha / sqrt(rank) in place of alpha / rank
    dora: bool = False  # train the length of every row apart from its direction
    train: tuple[str, ...] = ()  # globs of weights to train whole beside the deltas: norms, embeddings

    @property
    def rule(self) -> Lora:
        """The rule that the deltas follow."""
        return Lora(self.rank, self.alpha, self.targets, self.ranks, self.rslora, self.dora)

    def check(self, draft: Draft) -> Draft:
        """The targets match linear weights, `train` matches others, and there are no deltas yet."""
        adapted = frozenset(self.rule.names(draft.params))
        whole = frozenset(tree.select(draft.params, self.train, "lora: train")) if self.train else frozenset()
        if draft.adapted:
            raise InputError(
                f"stages: {self.label} finds deltas on the model already, expected none; drop the stage or model.deltas"
            )
        self._refuse_both(adapted, whole)
        return draft._replace(adapted=adapted, lora=self.rule, whole=draft.whole | whole)

    def _refuse_both(self, adapted: frozenset[str], whole: frozenset[str]) -> None:
        both = sorted(adapted & whole)
        if both:
            raise InputError(
                f"stages: {self.label} adapts {both[0]} and trains it whole as well, expected one; narrow targets or train"
            )

    def run(self, world: World) -> World:
        """world with trainable deltas."""
        params, trainable, rule = world.loaded.params, world.loaded.trainable, self.rule
        if self.train:
            params, whole = objectives.split_trainable(params, self.train, world.loaded.stored)
            trainable = {**trainable, **whole}
        deltas = rule.init(world.loaded.params, world.seed)
        n_trained = sum(leaf.numel() for leaf in tree.leaves({**trainable, **deltas}))
        n_all = sum(w.shape.numel() for w in params.values())
        world.log.say(f"{self.label}: rank {self.rank} on {len(deltas)} weights, {n_trained:,} of {n_all:,} parameters train")
        return world.with_model(params=params, lora=rule, trainable={**trainable, **deltas})


class Full(BaseStage, frozen=True, kw_only=True, tag="full"):
    """Train the weights that the globs match whole, in place of the loaded ones."""

    weights: tuple[str, ...] = ("*",)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of what trains; bfloat16 is rounded at random, so that small steps add up

    def check(self, draft: Draft) -> Draft:
        """The globs match dense weights."""
        names = frozenset(tree.select(draft.params, self.weights, "full: weights"))
        odd = sorted(names & (draft.quantized | draft.adapted))
        if odd:
            state = "quantized" if odd[0] in draft.quantized else "adapted by a delta"
            raise InputError(f"stages: {self.label} is to train {odd[0]}, which is {state}, expected a plain weight")
        return draft._replace(whole=draft.whole | names)

    def run(self, world: World) -> World:
        """world with trainable weights."""
        loaded, dtype = world.loaded, getattr(torch, self.dtype)
        params, whole = objectives.split_trainable(loaded.params, self.weights, loaded.stored, dtype)
        n_trained, n_all = sum(w.numel() for w in tree.leaves(whole)), sum(w.shape.numel() for w in params.values())
        world.log.say(f"{self.label}: {len(whole)} weights, {n_trained:,} of {n_all:,} parameters train")
        say_widening(world.log, self.label, whole)
        return world.with_model(params=params, trainable={**world.loaded.trainable, **whole})


class Load(BaseStage, frozen=True, kw_only=True, tag="load"):
    """Go on with another model; path = "run/NAME" is what a save stage of this program called NAME has written."""

    model: ModelSource

    def check(self, draft: Draft) -> Draft:
        """The model is there, or a stage before writes it."""
        return drafted(self.model, draft)

    def run(self, world: World) -> World:
        """world with the other model and nothing to train yet."""
        world.log.say(f"{self.label}: {self.model.path or self.model.config}")
        loaded = load(self.model, world.folder, world.seed)
        say_widening(world.log, self.label, loaded.params)
        return world._replace(loaded=loaded, quantization=None, fake=None)


class Merge(BaseStage, frozen=True, kw_only=True, tag="merge"):
    """Fold what was trained into the weights: computed in float32, rounded once to the dtype that the weights are stored in."""

    onto: Onto = "trained"
    dtype: Dtype | None = None  # of the new weights from here on; as they were stored if absent

    def check(self, draft: Draft) -> Draft:
        """There is something to merge, and what to merge it onto."""
        if not draft.adapted and not draft.whole:
            raise InputError(f"stages: {self.label} finds nothing trained to merge, expected a lora or full stage before it")
        check_onto(draft, self.label, self.onto)
        left = draft.quantized - draft.adapted - draft.whole
        return draft._replace(adapted=frozenset(), whole=frozenset(), quantized=left, over=None, merged=True)

    def run(self, world: World) -> World:
        """world with new weights and nothing to train; the record holds what rounding lost."""
        stored, record = merged(world, self.label, self.onto, self.dtype)
        old, device = world.loaded.params, device_of(world.loaded.params, world.loaded.trainable)
        compute = next(w.dtype for w in old.values() if isinstance(w, Tensor))
        new = {name: stored[name].to(device, compute) for name in world.loaded.trainable}
        return world.with_model(params={**old, **new}, stored=stored, lora=None, trainable={}).record(self.label, record)


class Quantize(BaseStage, frozen=True, kw_only=True, tag="quantize"):
    """Keep the weights that the globs match as codes of 8 or 4 bits, rounded to nearest or calibrated on data."""

    scheme: quant.Scheme
    weights: tuple[str, ...] = ("*_proj.weight",)
    exceptions: dict[str, quant.Scheme] = msgspec.field(default_factory=dict)  # glob -> another scheme, the first match wins
    keep: tuple[str, ...] = ()  # globs of weights to leave as they are
    method: calibrate.Method = calibrate.Rtn()

    @property
    def rule(self) -> quant.Quantization:
        """Which weight gets which scheme."""
        return quant.Quantization(self.scheme, self.weights, {**dict.fromkeys(self.keep), **self.exceptions})

    def check(self, draft: Draft) -> Draft:
        """The globs match linear weights whose shapes fit the schemes, without deltas; the calibration data is there."""
        names = frozenset(self.rule.plan(draft.params))
        odd = sorted(names & (draft.adapted | draft.whole | draft.quantized))
        if odd:
            raise InputError(
                f"stages: {self.label} is to quantize {odd[0]}, which trains or is quantized already, expected a plain weight; "
                "put a merge stage before it"
            )
        if isinstance(self.method, calibrate.Gptq):
            asked_data(draft, self.method.data, self.label, "instruct", "chat", "text")
            odd = [s for s in self.rule.plan(draft.params).values() if not isinstance(s, quant.Int8 | quant.Int4)]
            if odd:
                kind = "nf4" if isinstance(odd[0], quant.NF4) else "float8"
                raise InputError(f"stages: {self.label} has method gptq and scheme {kind}, expected int4 or int8, or method rtn")
        return draft._replace(quantized=draft.quantized | names)

    def run(self, world: World) -> World:
        """world with quantized leaves in its params; the record holds bytes before and after."""
        loaded, file = world.loaded, world.folder / "checkpoints" / self.label / "quantized.safetensors"
        names = self.rule.plan(loaded.params)
        if file.is_file():  # calibration may have taken long
            tensors = checkpoint.load_tensors(file)
            kinds = {name: LAYOUTS[type(scheme)] for name, scheme in names.items()}
            codes = {name: kind(*(tensors[f"{name}.{field}"] for field in kind._fields)) for name, kind in kinds.items()}
        else:
            codes = self._codes(world)
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic.atomic_file(file) as aside:
                checkpoint.save_tensors(aside, dict(tree.items(codes)))
        device = device_of(loaded.params, loaded.trainable)
        moved = {name: tree.map(lambda x: x.to(device), w) for name, w in codes.items()}
        params = {**loaded.params, **moved}
        before, after = tree.n_bytes(loaded.stored), tree.n_bytes({**loaded.stored, **codes})
        world.log.say(f"{self.label}: {len(codes)} weights, {before / 2**20:.2f} MiB -> {after / 2**20:.2f} MiB")
        record = {"bytes_before": before, "bytes_after": after, "n_weights": len(codes)}
        return world.with_model(params=params)._replace(quantization=self.rule).record(self.label, record)

    def _codes(self, world: World) -> Params:
        loaded = world.loaded
        names = self.rule.plan(loaded.params)
        if isinstance(self.method, calibrate.Rtn):
            found = self.rule.quantize({name: loaded.stored[name] for name in names})
        else:
            source, device = world.data[self.method.data], device_of(loaded.params, loaded.trainable)
            dataset = prepare(source, loaded.tokenizer, loaded.template, paths.cache())
            rows = islice(batches(dataset, source, CALIBRATION_ROWS), -(-self.method.rows // CALIBRATION_ROWS))
            world.log.say(f"{self.label}: calibrating on {self.method.rows} rows of {self.method.data}")
            some = [tree.map(lambda x: x.to(device), batch) for batch in rows]
            found = calibrate.gptq(loaded.model, loaded.params, some, self.rule, damp=self.method.damp)
        return {name: tree.map(Tensor.cpu, found[name]) for name in names}


class Qat(BaseStage, frozen=True, kw_only=True, tag="qat"):
    """Round the weights that train to their quantized values in every forward: quantizing them afterwards loses nothing."""

    scheme: quant.Scheme
    weights: tuple[str, ...] = ("*_proj.weight",)
    keep: tuple[str, ...] = ()

    @property
    def rule(self) -> quant.Quantization:
        """Which weight is rounded to which scheme."""
        return quant.Quantization(self.scheme, self.weights, dict.fromkeys(self.keep))

    def check(self, draft: Draft) -> Draft:
        """Every weight that is to be rounded trains whole."""
        odd = sorted(set(self.rule.plan(draft.params)) - draft.whole)
        if odd:
            raise InputError(f"stages: {self.label} is to round {odd[0]}, which does not train whole; put a full stage before it")
        return draft

    def run(self, world: World) -> World:
        """world whose objectives see rounded weights."""
        return world._replace(fake=self.rule)


def check_onto(draft: Draft, label: str, onto: Onto) -> None:
    """InputError where deltas from a folder are to be merged onto the quantized weights that they trained on elsewhere."""
    if draft.over is not None and onto == "trained":
        raise InputError(
            f"stages: {label} is to merge deltas onto what they trained on, but that was quantized by {dict(draft.over)} and is "
            "dense here, expected onto = 'stored'; or merge in the program that trains"
        )


def merged(world: World, label: str, onto: Onto, dtype: Dtype | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(all weights with what was trained folded in, a record of merge_error: the largest share of a weight's change lost).

    Deltas over quantized weights were trained on the dequantized ones: merging onto those is exact but for rounding, merging
    onto the dense weights on disk is not; the record and the log have both errors.
    """
    loaded = world.loaded
    whole = {name: leaf for name, leaf in loaded.trainable.items() if isinstance(leaf, Tensor)}
    deltas = {name: leaf for name, leaf in loaded.trainable.items() if isinstance(leaf, Delta)}
    kinds = {name: getattr(torch, dtype) if dtype else w.dtype for name, w in loaded.stored.items()}
    weights = {name: w.to(kinds[name]) for name, w in {**loaded.stored, **whole}.items()}
    if onto == "trained":
        codes = {name: w for name, w in loaded.params.items() if not isinstance(w, Tensor) and name not in deltas}
        weights = {**weights, **{name: quant.dequantize(w, kinds[name]) for name, w in codes.items()}}
    errors: dict[str, float] = {"trained": 0.0, "stored": 0.0}
    for name, delta in deltas.items():
        rule, here = _rule(world), delta.a.device
        bases: dict[str, Tensor] = {"stored": loaded.stored[name].to(here, torch.float32)}
        w = loaded.params[name]
        bases["trained"] = bases["stored"] if isinstance(w, Tensor) else quant.dequantize(w, torch.float32)
        exact = rule.merged_weight(bases["trained"], delta)
        for key, base in bases.items():
            final = rule.merged_weight(base, delta).to(kinds[name])
            errors = {**errors, key: max(errors[key], float(merge_error(final, exact, bases["trained"])))}
            weights = {**weights, name: final} if key == onto else weights
    record: dict[str, Any] = {"merge_error": errors[onto]}
    if any(not isinstance(loaded.params[name], Tensor) for name in deltas):
        record |= {"onto": onto, "merge_error_onto_trained": errors["trained"], "merge_error_onto_stored": errors["stored"]}
        world.log.say(
            f"{label}: merged onto the {'dequantized' if onto == 'trained' else 'dense'} weights; the share of a weight's change "
            f"that is lost: {errors['trained']:.2%} onto the dequantized ones, {errors['stored']:.2%} onto the dense ones on disk"
        )
    elif deltas:
        world.log.say(f"{label}: rounding loses at most {errors[onto]:.2%} of a weight's change")
    return weights, record


def _rule(world: World) -> Lora:
    if world.loaded.lora is None:
        raise TypeError("stages: deltas without a Lora rule, expected the stage that made them to set it")
    return world.loaded.lora
