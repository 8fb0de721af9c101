"""minitune: fine-tune open language models with pure functions over trees of tensors."""

__version__ = "0.1.0"
