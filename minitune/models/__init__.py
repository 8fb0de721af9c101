"""Model families: modules that export Config, from_hf, to_hf, shapes, head_name, hidden, decode, forward and Cache."""

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import msgspec
import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitune import ops, seeds, tree
from minitune.grad import remat
from minitune.hardware import to_device
from minitune.models import (
    gemma,
    gemma2,
    gemma3,
    gpt_oss,
    granite,
    llama,
    llama4,
    ministral3,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
)
from minitune.models.multimodal import text_config
from minitune.tree import Tree
from minitune.types import NO_DELTAS, Batch, Delta, Deltas, InputError, Params

FAMILIES = {  # by the model_type of config.json
    "llama": llama,
    "mistral": mistral,
    "ministral3": ministral3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "phi3": phi3,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "smollm3": smollm3,
    "granite": granite,
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "gpt_oss": gpt_oss,
    "llama4_text": llama4,
}


class Model(NamedTuple):
    """A family with its numbers: all that is needed to run parameters. `wrap` transforms every block, e.g. compiled.wrap; the
    backward computes the first n_remat blocks again, which is what `again` makes them do: grad.remat or offload.remat(...)."""

    family: ModuleType
    config: Any
    wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = lambda f: f
    n_remat: int = 0
    again: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = remat

    def forward(
        self,
        params: Params,
        tokens: Int[Tensor, "B T"],
        deltas: Deltas = NO_DELTAS,
        *,
        segment_ids: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of every token."""
        return self.family.forward(self.config, params, tokens, deltas, segment_ids=segment_ids)

    def hidden(self, params: Params, rows: Batch, deltas: Deltas) -> Float[Tensor, "B T D"]:
        """Final hidden states of every token, packed documents apart; rows on the host are sent to the weights."""
        place = params["model.embed_tokens.weight"].device
        tokens, segment_ids = to_device(rows.tokens, place), to_device(rows.segment_ids, place)
        how = {"segment_ids": segment_ids, "wrap": self.wrap, "n_remat": self.n_remat, "again": self.again}
        return self.family.hidden(self.config, params, tokens, deltas, **how)

    def head(self, params: Params, deltas: Deltas) -> tuple[Any, Delta | None]:
        """(weight [V, D], delta) that `logits` takes."""
        name = self.family.head_name(self.config)
        return params[name], deltas.get(name)

    def logits(self, states: Float[Tensor, "*rows D"], head: Any, delta: Delta | None) -> Float[Tensor, "*rows V"]:
        """Logits of hidden states, scaled and capped as the family does."""
        return self.family.scaled_logits(self.config, ops.linear(states, head, delta))

    def token_losses(
        self,
        params: Params,
        batch: Batch,
        deltas: Deltas,
        loss: Callable[..., Tensor],
        beside: Tree = None,
        *,
        summed: bool = False,
    ) -> Float[Tensor, "B T *values"]:
        """The loss of predicting each labelled token from those before it, in nats, 0 elsewhere; whole logits never exist.

        loss(logits [n V], targets [n]), by ops.by_rows; or, with `beside`, a tree of tensors [B, T, ...] that belong to the
        prediction of each token as loss_mask does, loss(logits, targets, rows of beside), by as many rows as the head is.
        summed: True if all that is done with the losses is to add them up, which spares an accelerator a second forward
        through a head that trains (grad.in_chunks). A batch on the host spares it the wait in ops.token_losses.
        """
        head, delta = self.head(params, deltas)
        mask = batch.labelled().roll(-1, 1)  # labelled() is False at 0, so nothing wraps round
        targets = tree.map(lambda x: x.roll(-1, 1), (batch.tokens, beside))

        def row_losses(logits: Tensor, *rows: Tree) -> Tensor:
            return loss(self.family.scaled_logits(self.config, logits), *rows)

        def chunk_losses(logits: Tensor, rows: tuple[Tensor, Tree]) -> Tensor:
            return ops.by_rows(row_losses)(logits, rows[0]) if beside is None else row_losses(logits, *rows)

        states = self.hidden(params, batch, deltas)
        return ops.token_losses(chunk_losses, states, targets, mask, head, delta, summed=summed).roll(1, 1)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight's name and shape."""
        return self.family.shapes(self.config)

    def init(self, seed: int, std: float = 0.02) -> dict[str, Tensor]:
        """Random float32 parameters: norms that multiply by one, biases zero, matrices normal(0, std), those that write to the
        residual stream std / sqrt(2 n_layers) (Radford et al. 2019, section 2.3); drawn from (seed, weight name)."""

        def weight(name: str, shape: tuple[int, ...]) -> Tensor:
            if name.endswith("norm.weight"):
                return torch.zeros(shape) if self.config.norm == "one_plus_w" else torch.ones(shape)
            if name.endswith(("bias", "sinks")):
                return torch.zeros(shape)
            residual = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj", ".w2.weight"))
            scale = std / (2 * self.config.n_layers) ** 0.5 if residual else std
            return scale * torch.randn(shape, generator=seeds.generator(seed, "init", name))

        return {name: weight(name, shape) for name, shape in self.shapes().items()}


def open(folder: Path) -> Model:
    """The model that a Hugging Face folder's config.json describes; InputError for an unknown family or field."""
    return from_hf(config_json(folder), str(folder / "config.json"))


def config_json(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a model folder; InputError if it is missing or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"models: {path} does not exist, expected a Hugging Face folder: config.json, *.safetensors, tokenizer files"
        )
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(hf, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is JSON, but no text
    except (ValueError, RecursionError) as error:
        raise InputError(f"models: {path} is no JSON ({error}); download it again") from None
    if not isinstance(hf, dict):
        raise InputError(f"models: {path} holds a {type(hf).__name__}, expected an object")
    return hf


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> Model:
    """The model that a config.json's content describes, without the part that sees images if there is one."""
    hf = text_config(hf)
    family = _family(hf.get("model_type"), where)
    return Model(family, family.from_hf(hf, where))


def open_config(path: Path) -> Model:
    """The model of a shape file: TOML with `family` and that family's Config fields."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(
            f"models: {path} does not exist, expected a model shape such as configs/models/llama-3.2-1b.toml"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"models: {path}: {error}") from None
    family = _family(table.pop("family", None), str(path))
    try:
        return Model(family, msgspec.convert(table, family.Config))
    except msgspec.ValidationError as error:
        raise InputError(f"models: {path}: {error}") from None


def _family(name: Any, where: str) -> ModuleType:
    if name not in FAMILIES:
        raise InputError(f"models: {where} is of family {name!r}, expected one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
