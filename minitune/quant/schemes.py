"""Schemes that turn a weight into codes and back."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from minitune.errors import InputError
from minitune.hardware import profiled
from minitune.quant import float4, float8, nf4
from minitune.quant.levels import codes_and_scales, levels_of
from minitune.quant.tensors import PackedInt4, PackedInt8, QFloat8, QInt4, QInt8, QTensor
from minitune.structs import CheckedStruct
from minitune.types import Adapted, Params

# bytes at whose multiples torch's kernel for int8 wants every row to begin
INT8_ALIGNMENT = 16
# weights decoded at a time on the CPU: so that intermediate results stay in its cache
PIECE = 2**19


class _Grid(CheckedStruct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    """Codes times a scale, symmetric about 0, with one scale a group of neighbours in a row."""

    divisors: ClassVar[tuple[float, ...]]

    def group_size(self, d_in: int) -> int:
        """Number of neighbours that share a scale."""
        raise NotImplementedError

    def nearest(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Level nearest to each number, of those that have a code."""
        raise NotImplementedError

    def scale(self, groups: Float[Tensor, "*rows group"]) -> Float[Tensor, "*rows 1"]:
        """Per group max|w| / d for the divisor d with the least squared error, rounded to bfloat16
        before any code is chosen: so bfloat16 files and kernels hold the very same weight, and so
        does float16 down to 2^-17.
        """
        peak = groups.abs().amax(-1, keepdim=True)
        choices = torch.stack([_storable(peak / divisor) for divisor in self.divisors])
        if len(choices) == 1:
            return choices[0]
        unit = choices[0]  # of the errors, whose squares would leave the range of float32
        errors = [
            ((self.levels(groups, s) * s - groups) / unit).square().sum(-1, keepdim=True)
            for s in choices
        ]
        return choices.gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]

    def levels(
        self, groups: Float[Tensor, "*rows group"], scale: Float[Tensor, "*rows 1"]
    ) -> Float[Tensor, "*rows group"]:
        """Levels nearest to w / scale."""
        return self.nearest(groups / scale)


class Int8(_Grid, frozen=True, tag="int8"):
    """8 bits a weight, one scale an output channel: codes in [-127, 127], scale = max|w| / 127."""

    divisors: ClassVar[tuple[float, ...]] = (127.0,)

    def group_size(self, d_in: int) -> int:
        """Number of neighbours that share a scale: the whole row."""
        return d_in

    def nearest(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Nearest integer in [-127, 127], ties to even."""
        return x.round().clamp(-127, 127)

    def pack(self, levels: Float[Tensor, "out in"], scale: Float[Tensor, "out groups"]) -> QInt8:
        """Leaf that stands for levels * scale."""
        return QInt8(levels.to(torch.int8), scale)


class Float8(_Grid, frozen=True, tag="float8"):
    """8-bit floats (e4m3), one scale an output channel, scale = max|w| / 448. A GPU that multiplies
    such numbers rounds what it multiplies them by as well, each token with its scale.
    """

    divisors: ClassVar[tuple[float, ...]] = (float8.LARGEST,)

    def group_size(self, d_in: int) -> int:
        """Number of neighbours that share a scale: the whole row."""
        return d_in

    def nearest(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Nearest 8-bit float."""
        return x.clamp(-float8.LARGEST, float8.LARGEST).to(float8.E4M3).to(x.dtype)

    def pack(self, levels: Float[Tensor, "out in"], scale: Float[Tensor, "out groups"]) -> QFloat8:
        """Leaf that stands for levels * scale."""
        return QFloat8(levels.to(float8.E4M3), scale)


class Int4(_Grid, frozen=True, tag="int4"):
    """4 bits a weight, one scale for every `group` neighbours of a row: codes in [-8, 7]."""

    divisors: ClassVar[tuple[float, ...]] = (7.0, 7.5, 8.0, 8.5, 9.0)
    # neighbours that share a scale: fewer are more exact, and take more memory
    group: Literal[32, 64, 128] = 32

    def group_size(self, d_in: int) -> int:
        """Number of neighbours that share a scale."""
        return self.group

    def nearest(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Nearest integer in [-8, 7], ties to even."""
        return x.round().clamp(-8, 7)

    def pack(self, levels: Float[Tensor, "out in"], scale: Float[Tensor, "out groups"]) -> QInt4:
        """Leaf that stands for levels * scale."""
        codes = (levels + 8).to(torch.uint8)
        return QInt4(codes[:, ::2] | codes[:, 1::2] << 4, scale)


class NF4(CheckedStruct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="nf4"):
    """4-bit NormalFloat in blocks of 64 with 8-bit block maxima (Dettmers et al. 2023, arXiv
    2305.14314, section 3).
    """


class MXFP4(CheckedStruct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="mxfp4"):
    """4-bit floats with a power of two for every 32 neighbours of a row (OCP Microscaling Formats
    1.0, section 5.3).
    """


class NVFP4(CheckedStruct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="nvfp4"):
    """4-bit floats with an 8-bit float for every 16 neighbours of a row, and one scale for all of
    these (NVIDIA 2025, arXiv 2509.25149, section 3).
    """


Scheme = Int8 | Float8 | Int4 | NF4 | MXFP4 | NVFP4
# neighbours of a row that a scheme can't divide
UNITS: dict[type, int] = {NF4: 2, MXFP4: float4.MX_GROUP, NVFP4: float4.NV_GROUP}
FOUR_BITS: dict[type, Callable[[Tensor], QTensor]] = {
    NF4: nf4.quantized,
    MXFP4: float4.mxfp4,
    NVFP4: float4.nvfp4,
}


@profiled("quantization")
def quantize(w: Float[Tensor, "out in"], scheme: Scheme) -> QTensor:
    """Leaf whose codes are nearest to w, computed in float32; InputError names a shape that does
    not fit the scheme.
    """
    check_fit("a weight", w, scheme)
    wide = w.detach().float()
    if isinstance(scheme, NF4 | MXFP4 | NVFP4):
        return FOUR_BITS[type(scheme)](wide)
    groups = wide.unflatten(1, (-1, scheme.group_size(w.shape[1])))
    scale = scheme.scale(groups)
    return scheme.pack(scheme.levels(groups, scale).flatten(1), scale.squeeze(-1))


@profiled("quantization")
def dequantize(q: QTensor, dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """Weight that the codes stand for, computed in float32 and rounded once to dtype."""
    if isinstance(q, PackedInt4 | PackedInt8):
        return dequantize(q.q, dtype)
    codes, scales = codes_and_scales(q)
    # a compiled loop makes no intermediate results
    whole = torch.compiler.is_compiling() or codes.device.type != "cpu"
    n_rows = len(codes) if whole else max(1, PIECE // max(1, codes.shape[1]))
    # what is most in memory, all pieces and the weight that they make, is the same of few
    if isinstance(codes, FakeTensor):
        n_rows = max(n_rows, -(-len(codes) // 4))

    def piece(some: Tensor, scale: Tensor) -> Tensor:
        groups = levels_of(q, some).unflatten(1, (scale.shape[1], -1))
        return (groups * scale[..., None]).to(dtype).flatten()

    pieces = list(map(piece, codes.split(n_rows), scales.split(n_rows)))
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[: q.shape.numel()].view(q.shape)


@profiled("quantization")
def fake(w: Float[Tensor, "out in"], scheme: Scheme) -> Float[Tensor, "out in"]:
    """dequantize(quantize(w)) in the dtype of w, with the gradient of the identity: the
    straight-through estimator (Bengio et al. 2013, arXiv 1308.3432, section 4).
    """
    return _StraightThrough.apply(w, scheme)


def base_weight(leaf: Any) -> Any:
    """Weight that an adapted leaf changes; any other leaf is its own."""
    return leaf.w if isinstance(leaf, Adapted) else leaf


def with_base_weight(leaf: Any, w: Any) -> Any:
    """Leaf that multiplies by w in place of its own weight, adapted as before."""
    return leaf._replace(w=w) if isinstance(leaf, Adapted) else w


def _packed_int8(w: QInt8) -> PackedInt8 | QInt8:
    """Leaf whose rows begin at whole 16 bytes, as torch's kernel for AVX512 reads them: at others
    it ends the process, and a file may lie in memory anywhere.
    """
    if w.shape[1] % INT8_ALIGNMENT:
        return w
    is_aligned = w.codes.data_ptr() % INT8_ALIGNMENT == 0
    return PackedInt8(w if is_aligned else w._replace(codes=w.codes.clone()))


def packed(params: Params) -> Params:
    """Parameters, int8 and int4 leaves on the CPU prepared for decoding few rows at a time, if a
    kernel takes their shape.

    torch's kernels take rows of bfloat16 and need no such products of the processor: they multiply
    in float32.
    """

    def leaf(w: Any) -> Any:
        # codes of another class are not here as a whole: parts of ranks, or offloaded
        if not isinstance(w, QInt8 | QInt4) or type(w.codes) is not Tensor:
            return w
        if w.codes.device.type != "cpu":
            return w
        if isinstance(w, QInt8):
            return _packed_int8(w)
        group = w.shape[1] // w.scale.shape[1]
        if w.shape[0] % 16 or group not in (32, 64, 128):
            return w
        codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            (levels_of(w, w.codes) + 8).to(torch.int32), 1
        )
        scale = w.scale.T.to(torch.bfloat16)
        return PackedInt4(w, codes, torch.stack([scale, torch.zeros_like(scale)], -1).contiguous())

    return {name: with_base_weight(w, leaf(base_weight(w))) for name, w in params.items()}


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, scheme: Scheme) -> Tensor:
        return dequantize(quantize(w, scheme), w.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        return grad_outputs[0], None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return tangents[0].view_as(tangents[0])


def check_fit(what: str, w: Tensor, scheme: Scheme) -> None:
    """Raise InputError if the scheme can not hold a weight of this shape; what: the words that name
    it.
    """
    d_in = w.shape[-1]
    if isinstance(scheme, Int4) and d_in % scheme.group:
        raise InputError(
            f"quant: {what} has shape {list(w.shape)}, expected its last size to be a multiple of "
            f"the group {scheme.group}; choose another group or scheme for it, or leave it as it is"
        )
    unit = UNITS.get(type(scheme), 1)
    if d_in % unit:
        kind = scheme.__struct_config__.tag
        reason = "stores pairs" if unit == 2 else "has a scale for so many neighbours"
        raise InputError(
            f"quant: {what} has shape {list(w.shape)}, expected its last size to be a multiple of "
            f"{unit} for {kind}, which {reason}; choose int8 for it, or leave it as it is"
        )


def _storable(scale: Tensor) -> Tensor:
    """Nearest bfloat16 as float32; 1 for a group of zeros or of numbers too small for a scale."""
    scale = scale.to(torch.bfloat16).float()
    return torch.where(scale < torch.finfo(torch.bfloat16).tiny, 1.0, scale)
