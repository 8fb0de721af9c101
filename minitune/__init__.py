"""minitune: fine-tune open language models with pure functions over trees of tensors."""

__version__ = "0.1.0"


class InputError(ValueError):  # here and not in types: whatever imports torch takes longer than a message may
    """What a user wrote or pointed at is wrong; the command line prints the message alone, without a traceback."""
