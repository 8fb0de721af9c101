"""How much of a forward the backward may keep: which blocks are computed again, by a budget."""

import torch

from minitune.attention import causal
from minitune.grad import kept_bytes
from minitune.models import decoder
from minitune.types import Deltas, InputError, Params


def n_remat(config: decoder.Config, params: Params, deltas: Deltas, n_rows: int, n_tokens: int, n_bytes: int) -> int:
    """The fewest blocks to compute again in the backward of n_rows x n_tokens so that all blocks together keep at most n_bytes.

    What a block keeps is measured on the last one. InputError if they keep more even when all are computed again.
    """
    like, n = params["model.embed_tokens.weight"], config.n_layers
    x = torch.ones(n_rows, n_tokens, config.d_model, dtype=like.dtype, device=like.device)
    seen = causal(n_tokens, x.device)
    places = decoder.places_of(config, seen.last, n_tokens, seen, x.dtype)[decoder.layer_kind(config, n - 1)]

    def block(x: torch.Tensor, w: Params, own: Deltas, places: decoder.Places) -> torch.Tensor:
        return decoder.block(config, w, own, x, places)

    rows = x.numel() * x.element_size()  # what every block keeps, its input
    inner = kept_bytes(block, x, decoder.layer_of(params, n - 1), decoder.layer_of(deltas, n - 1), places)
    found = next((i for i in range(n + 1) if n * rows + (n - i) * inner <= n_bytes), None)
    if found is None:
        raise InputError(
            f"memory: {n} blocks keep {n * rows / 2**20:,.1f} MiB for the backward of {n_rows} x {n_tokens} tokens when all are "
            f"computed again, expected at most {n_bytes / 2**20:,.3g}; take fewer rows at a time (micro_batch_size) or allow more"
        )
    return found
