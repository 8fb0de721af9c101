"""Declaration of a mixer: what the decoder, generation and planning want to know of it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor

from minitune.models.config import DecoderConfig, LayerKind
from minitune.models.shapes import Dims, Shapes
from minitune.nn.attention.key_range import KeyRange
from minitune.sharding.tokens import Sharers
from minitune.tree import Tree
from minitune.types import Params


class TokenPositions(NamedTuple):
    """Positions of the tokens of a call."""

    positions: Int[Tensor, "b T"]  # within their documents, from 0
    lengths: int | Int[Tensor, "b T"]  # of their documents, in tokens
    keys: KeyRange  # that each token may see at most
    # Ranks that have a part of these rows' tokens each. Positions and lengths are those of the
    # part of this rank, and keys those of all tokens.
    sharers: Sharers | tuple[()] = ()


class LayerMaps(NamedTuple):
    """One layer's weights, and the two operations that a mixer does with them by name."""

    weights: Params
    linear: Callable[[str, Tensor], Tensor]  # (name without ".weight", x) -> x W^T + bias
    linears: Callable[[Sequence[str], Tensor], list[Tensor]]  # the same for several maps of one x
    norm: Callable[[str, Tensor], Tensor]


class Mixer(NamedTuple):
    """Way for tokens to see one another, as seven pure functions of a config.

    dims says what the dims of the weights mean, by globs of their names; inputs gives what the
    layers of each kind share in a call; apply maps [B T D] to [B T D], and with (cache, slots) it
    writes the state of the tokens to these slots and reads the whole cache; empty_cache makes the
    state of one layer for n_rows rows of n_slots tokens, and filled gives its first n slots as
    views; flops counts a token's forward beyond linear maps, in a document with `companions` tokens
    on average.
    """

    shapes: Callable[[DecoderConfig], Shapes]
    dims: Callable[[DecoderConfig], Dims]
    inputs: Callable[
        [DecoderConfig, Sequence[LayerKind], TokenPositions, Any], dict[LayerKind, Any]
    ]
    apply: Callable[[DecoderConfig, LayerMaps, Tensor, Any, tuple[Tree, Tensor] | None], Tensor]
    empty_cache: Callable[[DecoderConfig, int, int, Tensor], Tree]
    filled: Callable[[Tree, int], Tree]
    flops: Callable[[DecoderConfig, LayerKind, float], float]
