"""Model: a family with its numbers, all that is needed to run parameters."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import TypeAliasType

from minitune import seeds, tree
from minitune.autodiff.remat import remat
from minitune.autodiff.row_values import checked_losses, checked_weights
from minitune.hardware import to_device
from minitune.models import decoder, weights
from minitune.models.block import BlockFunction
from minitune.models.block import block as decoder_block
from minitune.models.config import MixerName, layer_kind
from minitune.models.draws import Draws, with_dropout
from minitune.models.experts import owners
from minitune.models.family import Family
from minitune.models.probe import Probe, probed_block, report
from minitune.models.weights import head_name, layer_of
from minitune.nn import head as nn_head
from minitune.nn.head import by_rows
from minitune.nn.linear import linear
from minitune.sharding import tensor_parallel
from minitune.sharding.experts import check_experts, expert_ranks_of
from minitune.sharding.gather import (
    Ahead,
    gather,
    gathered,
    gathered_again,
    is_elsewhere,
    numbered,
)
from minitune.sharding.later import LaterSums, sums_later
from minitune.sharding.parts import is_sharded, placed_of
from minitune.sharding.tokens import TokenShares
from minitune.tree import Tree
from minitune.types import Batch, Params

BlockTransform = TypeAliasType("BlockTransform", Callable[[BlockFunction], BlockFunction])


class Model(NamedTuple):
    """Family with its numbers: all that is needed to run parameters.

    The training forward, `forward`, scoring and generation all run `block`: a function of your own
    in its place, with the arguments of models.block.block, changes the model everywhere at once.
    block_transform computes the same in another way, such as models.compile.wrap, and is applied to
    the function of every block; the backward recomputes the first n_remat blocks, by the transform
    `remat`: remat.remat or offload.remat(...).
    """

    family: Family
    config: Any
    block_transform: BlockTransform = lambda f: f
    n_remat: int = 0
    remat: BlockTransform = remat
    probe: Probe | None = None
    block: BlockFunction = decoder_block
    # of the noise on embedded tokens, where there are draws (decoder.neftune_noise)
    neftune_alpha: float = 0.0
    draws: Draws | None = None
    # ranks that share the tokens of their rows; what is not said to be a rank's own is of them all
    shares: TokenShares | None = None

    def forward(
        self,
        params: Params,
        tokens: Int[Tensor, "B T"],
        *,
        segment_ids: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits [B T V] that every token gives of the next; segment_ids keep packed documents
        apart (None: every row is one document).
        """
        states = self._own_hidden(params, tokens, segment_ids)
        return self.logits(params, self._of_all(states, tokens.shape[1]))

    def hidden(self, params: Params, rows: Batch) -> Float[Tensor, "B T D"]:
        """Final hidden states of every token, packed documents apart; rows on the host are sent to
        the weights.
        """
        return self._of_all(self._own_hidden_of_rows(params, rows), rows.tokens.shape[1])

    def _own_hidden_of_rows(self, params: Params, rows: Batch) -> Float[Tensor, "B n_own D"]:
        """Hidden states of the tokens that are this rank's."""
        device = params["model.embed_tokens.weight"].device
        tokens, segment_ids = to_device(rows.tokens, device), to_device(rows.segment_ids, device)
        noise = None
        if self.draws is not None:
            own = to_device(self.draws.seeds, device)
            rates, firsts = self.draws.dropout, self._first_tokens(tokens.shape[1])
            params = with_dropout(params, own, len(tokens), rates, *firsts)
            if self.neftune_alpha:
                noise = decoder.neftune_noise(self.config, own, segment_ids, self.neftune_alpha)
        return self._own_hidden(params, tokens, segment_ids, noise)

    def _own_hidden(
        self,
        params: Params,
        tokens: Int[Tensor, "B T"],
        segment_ids: Int[Tensor, "B T"] | None,
        noise: Float[Tensor, "B T D"] | None = None,
    ) -> Float[Tensor, "B n_own D"]:
        self._check_parts(params)
        params, sums = sums_later(params, self.config.n_layers, layer_of)
        probing = self._probing_all(tokens.shape[1])
        how: dict[str, Any] = {
            "segment_ids": segment_ids,
            "block_of": probing.block_of(params, self.in_part(), sums),
            "noise": noise,
            "shares": self.shares,
        }
        return decoder.hidden(self.config, params, tokens, **how)

    def _probing_all(self, n_tokens: int) -> "Model":
        """Model whose probe receives what belongs to the tokens of all ranks."""
        probe = self.probe
        if probe is None or self.shares is None:
            return self

        def receive(name: str, y: Tensor) -> None:
            probe.receive(name, self._of_all(y, n_tokens))

        return self._replace(probe=probe._replace(receive=receive))

    def _first_tokens(self, n_tokens: int) -> tuple[int, int]:
        """Places in their row of the first token of this rank, and of those that come together
        with it before a map that ranks share.
        """
        shares = self.shares
        return (
            (0, 0) if shares is None else (shares.first(n_tokens), shares.first_of_mixer(n_tokens))
        )

    def in_part(self) -> tuple[str, ...]:
        """Axes of the mesh along which blocks compute with the parts that weights are cut into."""
        shares_maps = self.shares is not None and self.shares.tensor is not None
        return (tensor_parallel.AXIS,) if shares_maps else ()

    def _check_parts(self, params: Params) -> None:
        """TypeError for weights that are whole where ranks share linear maps."""
        if not self.in_part():
            return
        if not any(tensor_parallel.is_in_parts(leaf) for leaf in params.values()):
            raise TypeError(
                "model: its ranks share linear maps along the axis tensor, and no weight is cut "
                "along it; cut the weights by sharding.placements.shard, or give the model "
                "shares=None"
            )

    def _own(self, x: Tree) -> Tree:
        """Tensors [B n_own ...] of the tokens that are this rank's, from those of all."""
        return x if self.shares is None else tree.map(self.shares.own, x)

    def _of_all(self, x: Float[Tensor, "B n_own *rest"], n_tokens: int) -> Tensor:
        """Tensor [B n_tokens ...] of all tokens, from this rank's."""
        return x if self.shares is None else self.shares.whole(x, n_tokens)

    def block_of(
        self,
        params: Params | None = None,
        in_part: tuple[str, ...] = (),
        sums: LaterSums | None = None,
    ) -> decoder.BlockOf:
        """Function that gives the block of layer i: transformed, recomputed in the backward,
        probed, as the model says.

        params: of the forwards that it is for, where ranks share them or they are offloaded: so
        each block's weights are asked for while another computes. in_part: axes of the mesh along
        which what is cut stays so, for hidden states of this rank's tokens. sums: where gradients
        of these params come in while the backward goes on.
        """
        ahead = None if params is None else self._ahead(params, in_part, sums)
        runs = {mixer: self.block_transform(self._block(mixer)) for mixer in self.config.mixers}
        # whole weights are there within a block alone, and a compiled one never sees a part
        kept = {mixer: gathered_again(run, ahead) for mixer, run in runs.items()}
        recomputed = {mixer: self.remat(gathered(run, ahead)) for mixer, run in runs.items()}

        def block_of(i: int) -> Callable[..., Tensor]:
            chosen = recomputed if i < self.n_remat else kept
            run = chosen[layer_kind(self.config, i).mixer]
            run = run if ahead is None else numbered(run, i)
            return run if self.probe is None else partial(report, run, self.probe, i)

        return block_of

    def _ahead(
        self, params: Params, in_part: tuple[str, ...], sums: LaterSums | None
    ) -> Ahead | None:
        if not any(map(is_elsewhere, tree.leaves(params))):
            return None
        layers = [layer_of(params, i) for i in range(self.config.n_layers)]
        shared = next(filter(is_sharded, tree.leaves(params)), None)
        ranks = None if shared is None else expert_ranks_of(placed_of(shared).mesh)
        if self.config.experts is None or ranks is None:
            return Ahead(layers, in_part, sums=sums)
        check_experts(self.config.experts.n_experts, ranks.size)
        owner_of = owners(self.config.experts, ranks.size)
        return Ahead(layers, in_part, ranks, owner_of, sums)

    def _block(self, mixer: MixerName) -> Callable[..., Tensor]:
        if self.probe is None:
            return partial(self.block, self.config, mixer)
        return partial(probed_block, self.block, self.config, mixer, self.probe.weights)

    def head(self, params: Params) -> Any:
        """Leaf [V, D] that turns hidden states into logits: the embedding itself when tied."""
        return params[head_name(self.config)]

    def logits(self, params: Params, states: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        """Logits of hidden states, scaled and capped as the family does."""
        return decoder.scaled_logits(self.config, linear(states, gather(self.head(params))))

    def token_losses(
        self,
        params: Params,
        batch: Batch,
        loss: Callable[..., Tensor],
        extra: Tree = None,
        *,
        n_values: int = 1,
        summed: bool = False,
    ) -> Float[Tensor, "B T *values"]:
        """Loss of predicting each labelled token from those before it, in nats, 0 elsewhere; whole
        logits never exist.

        loss(logits [n V], targets [n]), by head.by_rows; or, with `extra`, a tree of tensors [B, T,
        ...] that belong to the prediction of each token as loss_mask does, loss(logits, targets,
        rows of extra), by as many rows as the head is. It gives one value a row [n], or [n,
        n_values]; TypeError for another shape. summed: the losses are only added up, which spares
        an accelerator a second forward through a head that trains. Where loss_mask holds weights,
        all finite and none negative, each loss is multiplied with its own.
        """
        # target_mask() is False at 0, so nothing wraps round
        mask = batch.target_mask().roll(-1, 1)
        labels = tree.map(lambda x: x.roll(-1, 1), (batch.tokens, extra))

        def row_losses(logits: Tensor, *rows: Tree) -> Tensor:
            return loss(decoder.scaled_logits(self.config, logits), *rows)

        # rows: (targets, extra); torch.compile can't follow a subscript in a function's annotation
        def chunk_losses(logits: Tensor, rows: Tree) -> Tensor:
            if extra is None:
                return by_rows(row_losses, n_values)(logits, rows[0])
            return checked_losses(row_losses(logits, *rows), logits, n_values)

        of_chunk: Callable[..., Tensor] = chunk_losses
        if mask.is_floating_point():
            labels, mask, of_chunk = (labels, checked_weights(mask)), mask != 0, _weighted(of_chunk)
        labels, mask = self._own((labels, mask))
        rows = self._own_hidden_of_rows(params, batch), labels, mask, gather(self.head(params))
        nats = nn_head.token_losses(of_chunk, *rows, summed=summed)
        return self._of_all(nats, batch.tokens.shape[1]).roll(1, 1)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight's name and shape."""
        return weights.shapes(self.config)

    def init(self, seed: int, std: float = 0.02) -> dict[str, Tensor]:
        """Random float32 parameters: norms that multiply by one, biases zero, matrices normal(0,
        std), those that write to the residual stream std / sqrt(2 n_layers) (Radford et al. 2019,
        section 2.3); drawn from (seed, weight name).
        """
        return dict(self.init_each(seed, std))

    def init_each(self, seed: int, std: float = 0.02) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of `init`, each drawn when it is asked for."""
        for name, shape in self.shapes().items():
            yield name, self._init_weight(name, shape, seed, std)

    def _init_weight(self, name: str, shape: tuple[int, ...], seed: int, std: float) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.zeros(shape) if self.config.norm == "one_plus_w" else torch.ones(shape)
        if name.endswith(("bias", "sinks")):
            return torch.zeros(shape)
        residual = name.endswith(
            ("o_proj.weight", "down_proj.weight", "experts.down_proj", ".w2.weight")
        )
        scale = std / (2 * self.config.n_layers) ** 0.5 if residual else std
        return scale * torch.randn(shape, generator=seeds.generator(seed, "init", name))


def _weighted(losses: Callable[[Tensor, Tree], Tensor]) -> Callable[[Tensor, Tree], Tensor]:
    """losses(logits, labels), times a weight of each row: a function of (logits, (labels, w))."""

    def weighted(logits: Tensor, rows: Tree) -> Tensor:
        values = losses(logits, rows[0])
        return values * rows[1].view(-1, *(1 for _ in values.shape[1:]))

    return weighted


def untransformed(model: Model) -> Model:
    """Model whose blocks are neither compiled nor recomputed."""
    return model._replace(block_transform=lambda f: f, n_remat=0)
