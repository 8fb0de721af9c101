"""minitune: fine-tune open language models with pure functions over trees of tensors."""

from minitune.errors import InputError as InputError

__version__ = "0.1.0"
