"""transformers and PEFT as readers: of model folders, of adapters, and of GGUF files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from minitune.interop.readers.reader import Reader


def open_folder(folder: Path, packages: tuple[str, ...]) -> Reader:
    """Model folder in transformers, in float32; packages: those that transformers needs for it."""
    return _reader(_model(folder), packages)


def open_adapter(folder: Path, base: Path) -> Reader:
    """Adapter on its base in PEFT."""
    from peft import PeftModel

    return _reader(PeftModel.from_pretrained(_model(base), folder), ("transformers", "peft"))


def open_gguf(file: Path) -> Reader:
    """GGUF file in transformers, which decodes its tensors with the package gguf."""
    return _reader(_model(file.parent, gguf_file=file.name), ("transformers", "gguf"))


def _model(folder: Path, **how: Any) -> Any:
    """Causal model of transformers, whose generate draws nothing and ends nowhere by itself."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, **how
        )
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Show no progress bars of transformers while the block runs."""
    from transformers.utils import logging

    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows:
            logging.enable_progress_bar()


def _reader(model: Any, packages: tuple[str, ...]) -> Reader:
    model = model.eval()

    def logits(ids: Sequence[int]) -> Float[Tensor, "T V"]:
        with torch.no_grad():
            return model(input_ids=torch.tensor([list(ids)])).logits[0].float()

    def greedy(ids: Sequence[int], n: int) -> list[int]:
        tokens = torch.tensor([list(ids)])
        mask = torch.ones_like(tokens)
        with torch.no_grad():
            found = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=n)
        return found[0, len(ids) :].tolist()

    return Reader(packages, logits, greedy)
