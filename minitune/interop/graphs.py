"""Forwards as modules that torch.export takes, for formats that hold a graph of operations."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from minitune.errors import InputError
from minitune.interop.readers.reader import is_installed
from minitune.models import rope_scaling
from minitune.models.model import Model


def require_packages(packages: Mapping[str, str], extra: str) -> None:
    """InputError if a package is not installed; packages: what each is needed for, by its name."""
    for package, purpose in packages.items():
        if not is_installed(package):
            raise InputError(
                f"{extra}: the package {package} is not installed, expected it {purpose}; "
                f"pip install 'minitune[{extra}]'"
            )


def notes(model: Model) -> list[str]:
    """Lines on what the graph computes in another way than minitune."""
    lines = []
    if model.config.experts is not None:
        n = model.config.experts.n_experts
        lines.append(f"every token runs through all {n} experts: a graph can't choose rows")
    border = rope_scaling.border(model.config.rope_scaling)
    if border is not None:
        lines.append(
            f"a text that grows beyond {border} tokens keeps the angles of its cached keys, as in "
            "transformers; minitune computes them again"
        )
    return lines


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch's exporters say about packages and themselves while the block runs."""
    logger = logging.getLogger("torch")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def module_of(
    leaves: Mapping[str, Tensor],
    forward: Callable[..., Any],
    buffers: Mapping[str, Tensor] | None = None,
) -> torch.nn.Module:
    """Module that calls forward(leaves, *inputs), as torch.export wants one: its weights have the
    names of the leaves. The buffers are given to forward among the leaves, and it may write them.
    """
    module = torch.nn.Module()
    for name, w in leaves.items():
        owner, last = _owner(module, name)
        owner.register_parameter(last, torch.nn.Parameter(w, requires_grad=False))
    for name, x in (buffers or {}).items():
        owner, last = _owner(module, name)
        owner.register_buffer(last, x)

    def call(*inputs: Any) -> Any:
        return forward({**dict(module.named_parameters()), **dict(module.named_buffers())}, *inputs)

    module.forward = call
    return module


def _owner(module: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """(module that a weight belongs to, its last name): modules are nested as the name is."""
    *parents, last = name.split(".")
    for parent in parents:
        if not hasattr(module, parent):
            module.add_module(parent, torch.nn.Module())
        module = getattr(module, parent)
    return module, last
