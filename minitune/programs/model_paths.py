"""Paths of models that are names of a registry: `check`, with which a run begins, fetches them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from minitune.io.paths import is_registered_name
from minitune.programs.loading import ModelSource
from minitune.programs.variables import Expanded
from minitune.registry.names import spelled_out
from minitune.registry.opened import bring

PATHS = ("path", "deltas", "tokenizer")
MODELS = ("model", "teacher")  # keys of a program and of its stages that hold a ModelSource


def spell_out_names(raw: Mapping[str, Any]) -> None:
    """Write the registry before every bare name of a registered model among the paths of models in
    a parsed program, but for those where one of its stages writes."""
    stages = [table for table in _list(raw.get("stage")) if isinstance(table, dict)]
    written = {str(table.get("path")) for table in stages}
    found = [table.get(key) for table in (raw, *stages) for key in MODELS]
    for source in (one for one in found if isinstance(one, dict)):
        for field in PATHS:
            text = source.get(field)
            if isinstance(text, str) and text not in written:
                source[field] = _spelled_out(text)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _spelled_out(text: str) -> str:
    whole = spelled_out(text)
    if not isinstance(text, Expanded) or whole == text:
        return whole
    return Expanded.of(whole, whole.removesuffix(text) + text.written, text.variables)


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
