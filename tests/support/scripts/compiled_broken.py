"""A block that raises."""

from minitune import compiled


def block() -> None:
    """Fail as a block may."""
    raise ValueError("of the block")


try:
    compiled.wrap(print)(block)()
except ValueError as error:
    print(error)
