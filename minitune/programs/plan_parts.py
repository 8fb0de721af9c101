"""Weights as codes, and the stage of one rank, for plans."""

from collections.abc import Mapping

import msgspec

from minitune.checkpoint.hf_weights import once_quantized
from minitune.io.paths import locate
from minitune.planning.mesh import Mesh
from minitune.programs.loading import ModelSource
from minitune.programs.stages.train import Train
from minitune.quant.schemes import Scheme, quantize
from minitune.quant.tensors import QNF4
from minitune.types import Params


def of_rank(stage: Train, mesh: Mesh) -> Train:
    """Stage as one rank runs it: with its share of the rows of a batch, which is one at least."""
    return msgspec.structs.replace(stage, batch_size=-(-stage.batch_size // mesh.n_ranks))


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
