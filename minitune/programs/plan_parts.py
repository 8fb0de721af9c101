"""Weights as codes or off the device, and the stage of one rank, for plans."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import torch

from minitune import hardware
from minitune.checkpoint.hf_weights import once_quantized
from minitune.checkpoint.weight_files import weight_files
from minitune.io.paths import locate
from minitune.planning.flops import flops_per_token
from minitune.planning.mesh import Mesh
from minitune.planning.step_spec import BlockPlace, StepSpec
from minitune.programs.loading import ModelSource
from minitune.programs.offloading import refuse_plan
from minitune.programs.stages.train import Train
from minitune.quant.schemes import Scheme, quantize
from minitune.quant.tensors import QNF4
from minitune.types import Params


def of_rank(stage: Train, mesh: Mesh) -> Train:
    """Stage as one rank runs it: with its share of the rows of a batch, which is one at least."""
    return msgspec.structs.replace(stage, batch_size=-(-stage.batch_size // mesh.n_shares))


def refuse_offload(models: Iterable[ModelSource], mesh: Mesh) -> None:
    """InputError for a model that is offloaded where ranks cut the weights."""
    is_cut = mesh.n_ranks > 1 and mesh.plan
    if is_cut and any(model.offload is not None for model in models):
        refuse_plan(dict(mesh.plan))


def blocks_of(source: ModelSource | None, device: torch.device) -> BlockPlace:
    """Place of the frozen blocks of a model whose other weights lie on a device."""
    if source is None or source.offload is None:
        return "device"
    is_there = source.offload == "host" and not hardware.is_accelerator(device)
    return "device" if is_there else source.offload


def model_files(models: Iterable[ModelSource]) -> list[Path]:
    """Files of the weights of models, each once; none of those that a program makes itself."""
    paths = {str(model.path) for model in models if model.path is not None}
    folders = sorted(path for path in paths if not path.startswith("run/"))
    return [file for path in folders for file in weight_files(locate(path))]


def kept_codes(codes: Params, source: ModelSource) -> Params:
    """Codes in NF4 that stay as the folder has them: with the scale of each block in 32 bits."""
    in_nf4 = {name: w for name, w in codes.items() if isinstance(w, QNF4)}
    is_written = source.path is not None and not source.path.startswith("run/")
    if not in_nf4 or not is_written:
        return {}
    kept = once_quantized(locate(str(source.path)))
    return {
        name: w._replace(absmax=w.absmax.float(), nested_absmax=w.nested_absmax[:0])
        for name, w in in_nf4.items()
        if name in kept
    }


def quantized_params(params: Params, schemes: Mapping[str, Scheme]) -> Params:
    """Codes of the weights that have a scheme; weights of one shape and scheme share them."""
    alike = {(params[name].shape, scheme): params[name] for name, scheme in schemes.items()}
    codes = {(shape, scheme): quantize(w, scheme) for (shape, scheme), w in alike.items()}
    return {name: codes[params[name].shape, scheme] for name, scheme in schemes.items()}


def flops_of_step(stage: Train, step: StepSpec) -> float:
    """FLOPs of a step over rows of one document each, with every forward of a reference or a
    teacher.
    """
    frozen_models = []
    if step.teacher is not None and stage.cached_top_k is None:
        frozen_models.append(step.teacher.model)
    if stage.loss.needs_reference and stage.reference != "cached":
        frozen_models.append(step.model)
    forward = sum(flops_per_token(model, {}, step.n_tokens) for model in frozen_models)
    return flops_per_token(step.model, step.trainable, step.n_tokens) + forward
