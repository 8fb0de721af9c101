"""Names that stored tensors have in other people's folders, without torch."""

from collections.abc import Iterable

# what no decoder of text has: the parts that see images, and heads that guess further tokens
UNMODELLED = (
    "vision_tower.",
    "vision_model.",
    "multi_modal_projector.",
    "mtp.",
    "mtp_layers.",
)
WRAPPERS = ("_orig_mod.", "module.")  # of torch.compile and of data parallelism
BARE = ("embed_tokens.", "layers.", "norm.")  # of a model that was saved without its head


def unwrapped(name: str) -> str:
    """Name of a tensor without what torch puts before it."""
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return f"model.{name}" if name.startswith(BARE) else name


def is_unmodelled(name: str) -> bool:
    """True for a tensor that no decoder of text has."""
    return unwrapped(name).removeprefix("model.").startswith(UNMODELLED)


def described(names: Iterable[str]) -> str:
    """Words for tensors that no decoder of text has: how many, and of which parts."""
    parts = [unwrapped(name).removeprefix("model.").partition(".")[0] for name in names]
    return f"{len(parts)} tensors of {', '.join(sorted(set(parts)))}"
