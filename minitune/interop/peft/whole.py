"""Tensors of an adapter that are no deltas: trained whole, or copies of the base's ends.

PEFT saves embedding and head with an adapter that reaches one of them, and with
`save_embedding_layers`; when it loads the adapter, they take the place of the base's.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from minitune.errors import InputError
from minitune.interop.peft.layout import EMBEDDING, HEAD, module_name
from minitune.models.hf_multimodal import text_name

MERGE = "merge it with PEFT first, and load that"
UNTIE = (
    "expected one tensor for both (PEFT's ensure_weight_tying); merge it with PEFT, set "
    "tie_word_embeddings = false in the merged model's config, and load that"
)


def is_kept(name: str, modules: Collection[str]) -> bool:
    """True for a tensor in one of modules_to_save, or in a module below one of them.

    As in PEFT, an entry is the end of a module's path.
    """
    return any(path.endswith(module) for path in _paths(name) for module in modules)


def copied_weight(name: str) -> str | None:
    """Weight of the base that a tensor is a copy of; None for any other tensor."""
    text = text_name(name) or name
    if text.endswith(".base_layer.weight"):
        return f"{text.removesuffix('.base_layer.weight')}.weight"
    return text if text in (EMBEDDING, HEAD) else None


def changed_copies(
    copies: Mapping[str, Tensor], names: Collection[str], adapted: Collection[str], where: str
) -> dict[str, Tensor]:
    """Copies that are not the base's own tensors, which count as trained whole.

    names: those of the base's weights, or the weights themselves; copies are compared with these,
    but for ones on the meta device. InputError for a copy of another size, and for one that
    differs from the base's and has a delta as well.
    """
    changed = {}
    for name, copy in copies.items():
        own = EMBEDDING if name == HEAD and HEAD not in names else name
        w = names[own] if isinstance(names, Mapping) and own in names else None
        if w is not None and list(w.shape) != list(copy.shape):
            found, expected = f"{where} holds {name} {list(copy.shape)}", list(w.shape)
            resized = f"as in the base: its vocabulary was resized; {MERGE}"
            raise InputError(f"peft: {found}, expected {expected} {resized}")
        if w is not None and (not isinstance(w, Tensor) or w.is_meta or _equal(copy, w)):
            continue
        if name in adapted:
            raise InputError(
                f"peft: {where} holds {name} beside a delta on it, expected the base's own weight "
                f"there; is it of another base, or else {MERGE}"
            )
        changed[name] = copy
    return changed


def require_tied(
    whole: Mapping[str, Tensor],
    adapted: Collection[str],
    names: Collection[str],
    where: str,
) -> dict[str, Tensor]:
    """Whole tensors, without the head where the model ties it to the embedding.

    InputError if the adapter has something of its own for one of the two.
    """
    if HEAD in names:
        return dict(whole)
    head, embedding = whole.get(HEAD), whole.get(EMBEDDING)
    parted = None
    if HEAD in adapted or (head is not None and embedding is None):
        parted = f"{HEAD} apart from the embedding"
    elif embedding is not None and (head is None or not head.equal(embedding)):
        parted = f"{EMBEDDING} apart from the head"
    if parted is not None:
        found = f"{where} trains {parted}, which this model ties to it"
        raise InputError(f"peft: {found}; {UNTIE}")
    return {name: tensor for name, tensor in whole.items() if name != HEAD}


def unknown_tensor(key: str, where: str) -> InputError:
    """Error for a tensor that is neither a part of a delta nor trained whole."""
    if ".lora_embedding_" in key:
        found = f"holds {key}, a delta on the embedding, expected it trained whole or not at all"
    else:
        found = (
            f"holds {key}, expected base_model.model.<module>.lora_A.weight, .lora_B.weight or "
            ".lora_magnitude_vector, or a tensor of modules_to_save"
        )
    return InputError(f"peft: {where} {found}; {MERGE}")


def _equal(copy: Tensor, w: Any) -> bool:
    return torch.equal(copy.to(w.device, w.dtype), w)


def _paths(name: str) -> Iterator[str]:
    """Paths of the modules that hold a tensor, from its own outwards."""
    path = module_name(name)
    while path:
        yield path
        path = path.rpartition(".")[0]
