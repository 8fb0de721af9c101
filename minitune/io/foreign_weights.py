"""Weights in the formats of other tools, which are not read: what a folder of them is."""

from pathlib import Path

# (files, what they are, what makes a folder that opens here of them)
FOREIGN = (
    (
        "adapter_*.pt",
        "torchtune's adapter",
        "use the adapter_model.safetensors that it writes beside",
    ),
    (
        "hf_model_*.pt",
        "torchtune's weights in Hugging Face's names",
        "let its checkpointer write safetensors (safe_serialization: True)",
    ),
    (
        "consolidated.*.pth",
        "Meta's own checkpoint",
        "download the same model in Hugging Face's format",
    ),
)


def foreign_weights(folder: Path) -> tuple[str, str] | None:
    """(what a file of another tool's format in a folder is, what to do), or None without one."""
    for pattern, what, remedy in FOREIGN:
        file = min((path.name for path in folder.glob(pattern)), default=None)
        if file is not None:
            return f"{file} is {what}", remedy
    return None
