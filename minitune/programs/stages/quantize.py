"""Stages that quantize weights, or train them to be quantized."""

from pathlib import Path
from typing import Any, ClassVar

import msgspec
from torch import Tensor

from minitune import tree
from minitune.algorithms import gptq
from minitune.checkpoint.tensors import file_slices, load_tensors, save_tensors
from minitune.errors import InputError
from minitune.io.atomic import atomic_folder
from minitune.io.checksums import damaged_file, write_checksums
from minitune.programs.data_tables import require_data
from minitune.programs.sharding import whole_on_host
from minitune.programs.stages.base import BaseStage
from minitune.programs.stages.batches import calibration_batches, tokenized
from minitune.programs.state import AbstractState, PipelineState
from minitune.quant.rules import Quantization, refuse_not_finite
from minitune.quant.schemes import MXFP4, NF4, NVFP4, Float8, Int4, Int8, Scheme, quantize
from minitune.quant.tensors import QMXFP4, QNF4, QNVFP4, QFloat8, QInt4, QInt8
from minitune.sharding.gather import gather
from minitune.sharding.parts import is_sharded
from minitune.types import Params

LAYOUTS: dict[type, Any] = {
    Int8: QInt8,
    Float8: QFloat8,
    Int4: QInt4,
    NF4: QNF4,
    MXFP4: QMXFP4,
    NVFP4: QNVFP4,
}


class Quantize(BaseStage, frozen=True, kw_only=True, tag="quantize"):
    """Keep the weights that the globs match as codes of 8 or 4 bits, rounded to nearest or
    calibrated on data.
    """

    shards: ClassVar[bool] = True

    scheme: Scheme  # codes of a weight and their scales: { kind = "int4", group = 32 }
    weights: tuple[str, ...] = ("*_proj.weight",)  # globs of the weights to quantize
    # glob -> another scheme, the first match wins
    exceptions: dict[str, Scheme] = msgspec.field(default_factory=dict)
    keep: tuple[str, ...] = ()  # globs of weights to leave as they are
    # how a weight is rounded: to nearest, or calibrated on data (gptq)
    method: gptq.Method = gptq.Rtn()

    @property
    def rule(self) -> Quantization:
        """Rule that gives each weight its scheme."""
        return Quantization(
            self.scheme, self.weights, {**dict.fromkeys(self.keep), **self.exceptions}
        )

    def check(self, abstract: AbstractState) -> AbstractState:
        """InputError unless the globs match plain weights that fit the schemes, and the calibration
        data is there.
        """
        _check_kept(self, abstract)
        names = frozenset(self.rule.plan(abstract.params))
        odd = sorted(names & (abstract.adapted | abstract.whole | abstract.quantized))
        if odd:
            raise InputError(
                f"stages: {self.label} is to quantize {odd[0]}, which trains or is quantized "
                "already, expected a plain weight; put a merge stage before it"
            )
        if isinstance(self.method, gptq.Gptq):
            require_data(abstract, self.method.data, self.label, "instruct", "chat", "text")
            odd = [
                s
                for s in self.rule.plan(abstract.params).values()
                if not isinstance(s, Int8 | Int4)
            ]
            if odd:
                kind = odd[0].__struct_config__.tag
                raise InputError(
                    f"stages: {self.label} has method gptq and scheme {kind}, expected int4 or "
                    "int8, or method rtn"
                )
        codes = {**abstract.codes, **self.rule.codes(abstract.params)}
        return abstract._replace(quantized=abstract.quantized | names, codes=codes)

    def prepare(self, abstract: AbstractState) -> list[str]:
        """Notes on the calibration data; InputError for a row that can't be tokenized."""
        if not isinstance(self.method, gptq.Gptq):
            return []
        return [tokenized(abstract, self.method.data).description]

    def run(self, state: PipelineState) -> PipelineState:
        """State with quantized leaves in its params; the record holds bytes before and after."""
        loaded = state.loaded
        if state.sharding is not None and isinstance(self.method, gptq.Gptq):
            codes = self._calibrated_by_all(state, self.method)
        elif any(is_sharded(w) for w in loaded.stored.values() if isinstance(w, Tensor)):
            codes = self._of_parts(state)
        else:
            with state.ranks.first_on_node():
                codes = self._kept(state) or self._made(state)
        file = _codes_file(state, self.label)
        on_disk = loaded.offloading is not None and loaded.offloading.place == "disk"
        slices = file_slices(file) if on_disk and file.is_file() else {}
        moved = {n: loaded.placed(n, state.cut(n, w), slices=slices) for n, w in codes.items()}
        params = {**loaded.params, **moved}
        before, after = tree.n_bytes(loaded.stored), tree.n_bytes({**loaded.stored, **codes})
        state.log.say(
            f"{self.label}: {len(codes)} weights, {before / 2**20:.2f} MiB -> {after / 2**20:.2f} "
            "MiB"
        )
        record = {"bytes_before": before, "bytes_after": after, "n_weights": len(codes)}
        return (
            state.with_model(params=params)
            ._replace(quantization=self.rule)
            .record(self.label, record)
        )

    def _kept(self, state: PipelineState) -> Params | None:
        """Codes of the weights, whole and on the host, that an earlier run of this stage has kept
        in the run folder; None if there are none, or if the file is not what was written.
        """
        file, names = _codes_file(state, self.label), self.rule.plan(state.loaded.params)
        if not file.is_file() or damaged_file(file.parent) is not None:
            return None
        tensors = load_tensors(file)
        kinds = {name: LAYOUTS[type(scheme)] for name, scheme in names.items()}
        return {
            name: kind(*(tensors[f"{name}.{field}"] for field in kind._fields))
            for name, kind in kinds.items()
        }

    def _made(self, state: PipelineState) -> Params:
        """Codes of the weights on the host, which the first rank keeps in the run folder."""
        if isinstance(self.method, gptq.Gptq):
            calibrated = self._calibrated(state, self.method)
            codes = {name: tree.map(Tensor.cpu, w) for name, w in calibrated.items()}
        else:
            codes = self._rounded(state)
        self._keep(state, codes)
        return codes

    def _keep(self, state: PipelineState, codes: Params) -> None:
        """Write the codes to the run folder, on the first rank: calibration may have taken long."""
        file = _codes_file(state, self.label)
        if state.ranks.is_first:
            with atomic_folder(file.parent) as aside:
                save_tensors(aside / file.name, dict(tree.items(codes)))
                write_checksums(aside, [aside / file.name])

    def _calibrated_by_all(self, state: PipelineState, method: gptq.Gptq) -> Params:
        """Part of this rank of the codes that all ranks calibrate, each on all of the data, or find
        in the run folder.

        Each computes the same; the first one's codes count, because GPUs of several kinds may round
        in several ways.
        """
        ranks, cut, kept = state.ranks, state.cut, self._kept(state)
        is_missing = ranks.any(kept is None)  # on any rank
        if kept is not None and not is_missing:
            return {name: cut(name, w) for name, w in kept.items()}
        codes = self._calibrated(state, method, lambda name, w: cut(name, ranks.from_first(w)))
        self._keep(state, whole_on_host(codes, ranks))
        return codes

    def _of_parts(self, state: PipelineState) -> Params:
        """Part of this rank of the codes of weights that a merge has left in parts: each weight is
        put together, rounded and cut again."""
        codes = {}
        for name, scheme in self.rule.plan(state.loaded.params).items():
            w = gather(state.loaded.stored[name])
            refuse_not_finite({name: w}, [name])
            codes[name] = state.cut(name, quantize(w, scheme))
        return codes

    def _rounded(self, state: PipelineState) -> Params:
        """Codes on the host that are nearest to the weights, or that the folder of the model has
        already.
        """
        loaded, names = state.loaded, self.rule.plan(state.loaded.params)
        held = {name: loaded.stored[name] for name in names}
        codes = {name: w for name, w in held.items() if not isinstance(w, Tensor)}
        if codes:
            said = f"{len(codes)} weights keep the codes and scales of {loaded.source}"
            state.log.say(f"{self.label}: {said}")
        plain = {name: w for name, w in held.items() if name not in codes}
        refuse_not_finite(plain, plain)
        rounded = {}
        with state.log.counter(self.label, len(plain)) as count:
            for name, w in plain.items():
                rounded[name] = quantize(w, names[name])
                count()
        every = {**rounded, **codes}
        return {name: tree.map(Tensor.cpu, every[name]) for name in names}

    def _calibrated(
        self, state: PipelineState, method: gptq.Gptq, placed: gptq.Placing = gptq.as_it_is
    ) -> Params:
        """Codes that GPTQ finds, as far as `placed` keeps them, in the order of the weights."""
        loaded = state.loaded
        some = calibration_batches(state, self.label, method.data, method.rows)
        with state.log.progress(self.label, loaded.model.config.n_layers) as progress:
            quantized = gptq.gptq(
                loaded.model,
                loaded.params,
                some,
                self.rule,
                damp=method.damp,
                on_block=lambda n_done: progress.update(n_done, {}),
                placed=placed,
            )
        return {name: quantized[name] for name in self.rule.plan(loaded.params)}


def _codes_file(state: PipelineState, label: str) -> Path:
    """File of the run folder in which a stage keeps codes."""
    return state.folder / "checkpoints" / label / "quantized.safetensors"


class Qat(BaseStage, frozen=True, kw_only=True, tag="qat"):
    """Round the weights that train to their quantized values in every forward: quantizing them
    afterwards loses nothing.
    """

    shards: ClassVar[bool] = True

    scheme: Scheme  # as in the quantize stage that will follow
    weights: tuple[str, ...] = ("*_proj.weight",)  # globs of the weights that are rounded
    keep: tuple[str, ...] = ()  # globs of weights to leave as they are

    @property
    def rule(self) -> Quantization:
        """Rule that gives each weight the scheme it is rounded to."""
        return Quantization(self.scheme, self.weights, dict.fromkeys(self.keep))

    def check(self, abstract: AbstractState) -> AbstractState:
        """InputError unless every weight that is to be rounded trains whole."""
        _check_kept(self, abstract)
        odd = sorted(set(self.rule.plan(abstract.params)) - abstract.whole)
        if odd:
            raise InputError(
                f"stages: {self.label} is to round {odd[0]}, which does not train whole; put a "
                "full stage before it"
            )
        return abstract

    def run(self, state: PipelineState) -> PipelineState:
        """State whose objectives see rounded weights."""
        return state._replace(fake=self.rule)


def _check_kept(stage: Quantize | Qat, abstract: AbstractState) -> None:
    """InputError for a glob of `keep` that matches none of the weights that the stage is about."""
    if stage.keep:
        names = tree.select(abstract.params, stage.weights, f"{stage.label}: weights")
        tree.select(names, stage.keep, f"{stage.label}: keep")
