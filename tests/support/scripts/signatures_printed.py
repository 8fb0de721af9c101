"""Signatures of the functions that pages use, as inspect prints them: {name: [the signature, its parameters and its result]}."""

import inspect
import json
import sys
from pathlib import Path

from minitune import steps
from support.public_names import functions_of, names_in


def printed(function: object) -> list[str]:
    """The whole signature, then each of its parts."""
    signature = inspect.signature(function)  # pyright: ignore[reportArgumentType]
    result = inspect.formatannotation(signature.return_annotation)
    return [str(signature), *map(str, signature.parameters.values()), result]


names = {name: thing for page in sys.argv[1:] for name, thing in names_in(Path(page).read_text("utf-8")).items()}
names |= {f"minitune.steps.{name}": step for name, step in vars(steps).items() if name.endswith("_step")}
functions = {name: function for key, thing in names.items() for name, function in functions_of(key, thing)}
print(json.dumps({name: printed(function) for name, function in functions.items()}))
