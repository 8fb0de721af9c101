"""A block that raises."""

from minitune.models.compile import wrap


def block() -> None:
    """Fail as a block may."""
    raise ValueError("of the block")


try:
    wrap(print)(block)()
except ValueError as error:
    print(error)
