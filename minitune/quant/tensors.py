"""Weights that are codes and scales: one NamedTuple a layout."""

from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Float, Float8e4m3fn, Int8, UInt8
from torch import Tensor


class QInt8(NamedTuple):
    """Weight as codes * scale: codes in [-127, 127], one scale an output channel."""

    codes: Int8[Tensor, "out in"]
    scale: Float[Tensor, "out 1"]

    @property
    def shape(self) -> torch.Size:
        """[out, in] of the weight."""
        return self.codes.shape


class QFloat8(NamedTuple):
    """Weight as codes * scale: codes are 8-bit floats (e4m3) up to 448, one scale an output
    channel.
    """

    codes: Float8e4m3fn[Tensor, "out in"]
    scale: Float[Tensor, "out 1"]

    @property
    def shape(self) -> torch.Size:
        """[out, in] of the weight."""
        return self.codes.shape


class QInt4(NamedTuple):
    """Weight as (code - 8) * scale: byte k of a row holds code 2k in its low four bits and 2k + 1
    in its high ones; each scale serves in / groups neighbours of its row.
    """

    codes: UInt8[Tensor, "out half"]
    scale: Float[Tensor, "out groups"]

    @property
    def shape(self) -> torch.Size:
        """[out, in] of the weight."""
        return torch.Size([self.codes.shape[0], 2 * self.codes.shape[1]])


class QNF4(NamedTuple):
    """Weight as nf4.TABLE[code] * absmax of its block of 64, counted over the flattened weight; the
    absmax themselves are 8-bit codes of a dynamic map, times nested_absmax of their block of 256,
    plus offset (Dettmers et al. 2023, arXiv 2305.14314, section 3). Byte k of a row holds code 2k
    in its HIGH four bits: the layout of bitsandbytes.

    absmax is [out, in / 64] where rows consist of whole blocks, so that a part of the weight has
    its part of them; a list of all blocks elsewhere. Folders whose scales are not quantized a
    second time have them in `absmax` as they are; then nested_absmax is empty and offset 0.
    """

    codes: UInt8[Tensor, "out half"]
    absmax: UInt8[Tensor, "*blocks"] | Float[Tensor, "*blocks"]
    nested_absmax: Float[Tensor, "nested"]
    offset: Float[Tensor, ""]

    @property
    def shape(self) -> torch.Size:
        """[out, in] of the weight."""
        return torch.Size([self.codes.shape[0], 2 * self.codes.shape[1]])

    @property
    def scale(self) -> Tensor:
        """Scales of the codes, by the name that they have in other layouts."""
        return self.absmax


class QMXFP4(NamedTuple):
    """Weight as float4.LEVELS[code] * 2^(scale - 127): byte k of a row holds code 2k in its low
    four bits and 2k + 1 in its high ones; each scale serves 32 neighbours of its row.
    """

    codes: UInt8[Tensor, "out half"]
    scale: UInt8[Tensor, "out groups"]

    @property
    def shape(self) -> torch.Size:
        """[out, in] of the weight."""
        return torch.Size([self.codes.shape[0], 2 * self.codes.shape[1]])


class QNVFP4(NamedTuple):
    """Weight as float4.LEVELS[code] * scale / divisor, with the codes as in QMXFP4; each scale
    serves 16 neighbours of its row, the divisor all of them.
    """

    codes: UInt8[Tensor, "out half"]
    scale: Float8e4m3fn[Tensor, "out groups"]
    divisor: Float[Tensor, ""]

    @property
    def shape(self) -> torch.Size:
        """[out, in] of the weight."""
        return torch.Size([self.codes.shape[0], 2 * self.codes.shape[1]])


class PackedInt4(NamedTuple):
    """Int4 weight for decoding: its codes, and the same codes in the order that torch's CPU kernel
    reads.

    That order depends on the processor, so this leaf is made after loading and never saved.
    """

    q: QInt4
    codes: UInt8[Tensor, "out half"]
    scales: BFloat16[Tensor, "groups out 2"]  # (scale, zero point)

    @property
    def shape(self) -> torch.Size:
        """[out, in] of the weight."""
        return self.q.shape


class PackedInt8(NamedTuple):
    """Int8 weight for decoding in bfloat16, whatever the dtype of the activations; made after
    loading and never saved.
    """

    q: QInt8

    @property
    def shape(self) -> torch.Size:
        """[out, in] of the weight."""
        return self.q.shape


QTensor = QInt8 | QFloat8 | QInt4 | QNF4 | QMXFP4 | QNVFP4 | PackedInt4 | PackedInt8
