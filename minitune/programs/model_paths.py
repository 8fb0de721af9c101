"""Paths of models that are names of a registry: `check`, with which a run begins, fetches them."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from minitune.io.paths import is_registered_name
from minitune.programs.loading import ModelSource
from minitune.registry.opened import bring

PATHS = ("path", "deltas", "tokenizer")


def fetched_models(sources: Iterable[ModelSource], say: Callable[[str], None]) -> list[str]:
    """Lines on the registered models among the paths of models, each brought to this machine.

    An alias is what it names now. InputError for one that can't be fetched.
    """
    lines = []
    for name in sorted({name for source in sources for name in _names(source)}):
        opened = bring(name, say)
        lines.append(f"model: {name} is {opened.words}, in {opened.folder}")
    return lines


def _names(source: ModelSource) -> Iterator[str]:
    for field in PATHS:
        path = getattr(source, field)
        if path is not None and is_registered_name(path):
            yield path


def models_of(source: ModelSource, stages: Sequence[object]) -> Iterator[ModelSource]:
    """Every model that a program loads: its own, those of load stages, and teachers."""
    yield source
    for stage in stages:
        for name in getattr(stage, "__struct_fields__", ()):
            value = getattr(stage, name)
            if isinstance(value, ModelSource):
                yield value
