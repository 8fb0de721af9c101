"""Checks of a program before anything expensive: folders, stages, and the data as they use it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from minitune.checkpoint.hf_weights import check_weights
from minitune.data.readers import require_rows
from minitune.data.source import Source
from minitune.io import paths
from minitune.io.paths import locate
from minitune.models.model import Model
from minitune.models.open import FAMILIES
from minitune.models.open import open as open_model
from minitune.programs.data_paths import located, refreshed
from minitune.programs.loading import ModelSource, abstract_state
from minitune.programs.one_process import require_one_process
from minitune.programs.stages.train import Train
from minitune.programs.state import AbstractState, DataStage, PipelineStage, trainable_like
from minitune.text.template import Template, with_options


def check(
    source: ModelSource,
    sources: Mapping[str, Source],
    stages: Sequence[PipelineStage],
) -> list[str]:
    """Lines that say what a program would work on; InputError for whatever would stop it later.

    The data is tokenized for the stages that will use it, and stays in the cache. Of weights only
    the headers are read.
    """
    require_one_process()
    fetched = refreshed(
        path for data in sources.values() for path in data.paths_by_key("").values()
    )
    placed = {name: located(data) for name, data in sources.items()}
    abstract = abstract_state(source, AbstractState(placed, Model(FAMILIES["llama"], None), {}))
    _, template = abstract.text()
    lines = _model_lines(abstract, template)
    for model in _models(source, stages):
        if model.path is not None and not model.path.startswith("run/"):
            check_weights(locate(model.path), open_model(locate(model.path)).shapes())
    lines += fetched
    for name, data in placed.items():
        for part in data.parts():
            require_rows(part)
            with_options(template, part.chat_template_kwargs, part.path_names)
        lines.append(f"data: {name} is {', '.join(map(_read_as, data.parts()))}")
    lines += data_notes(source, sources, stages)

    # All that costs nothing comes first: rows are read once every stage has found its place.
    before = _states_before(stages, abstract)
    for stage, found in zip(stages, before, strict=True):
        lines.append(f"stage: {stage.label}")
        if isinstance(stage, DataStage):
            lines += [f"  {note}" for note in stage.prepare(found)]
    return lines


def _model_lines(abstract: AbstractState, template: Template) -> list[str]:
    """Lines on the model's size and on its chat template."""
    n_params = sum(w.numel() for w in abstract.params.values())
    vocabulary = abstract.model.config.vocab_size
    sizes = f"{n_params:,} parameters, vocabulary {vocabulary:,}"
    lines = [f"model: {sizes}, template: {template.origin}"]
    if template.tool_use is not None:
        lines.append(f"template: {template.tool_use.origin} for conversations with tools")
    return lines


def _read_as(part: Source) -> str:
    """Words for a file: its path, and how its rows are read."""
    words = [f"{name} = {column}" for name, column in part.columns.items()]
    how = f"{part.format}: {', '.join(words)}" if words else part.format
    if part.split is None:
        return f"{part.path_names} ({how})"
    heldout = part.split.fraction
    share = heldout if part.split.part == "heldout" else 1 - heldout
    return f"{share:.3g} of {part.path_names} ({how})"


def _states_before(stages: Sequence[PipelineStage], abstract: AbstractState) -> list[AbstractState]:
    """State before each stage; InputError for what would stop one of them."""
    before: list[AbstractState] = []
    for stage in stages:
        before.append(abstract)
        abstract = stage.check(abstract)
        if isinstance(stage, Train):
            # an optimizer that chooses leaves by globs finds out what they match when it begins
            trainable = trainable_like(abstract)
            stage.optimizer_for(trainable, seed=0).init(trainable)
    return before


def data_notes(
    source: ModelSource, sources: Mapping[str, Source], stages: Sequence[PipelineStage]
) -> list[str]:
    """Lines on tables that a stage uses and that are still the demo's beside a user's model or
    data.

    Another line says that a folder ./demo of the user's is not what demo/... means, another that
    tokenized data is not kept where it usually is.
    """
    used = {name: data for name, data in sources.items() if name in _data_names(stages)}
    parts = [pair for name, data in used.items() for pair in data.paths_by_key(name).items()]
    models = [("model", path) for path in (source.path, source.config) if path is not None]
    embedded = paths.PACKAGE / "demo"
    is_demo = {path: locate(path).is_relative_to(embedded) for _, path in [*models, *parts]}
    lines = []
    if not all(is_demo.values()):
        left = [(key, path) for key, path in parts if is_demo[path]]
        lines += [f"note: {key} is still the demo's ({path}); change it" for key, path in left]
    for path in sorted({path for path, demo in is_demo.items() if demo and Path(path).exists()}):
        lines.append(f"note: {path} is the embedded demo, not what lies here; ./{path} is that")
    cache_note = paths.cache_note()
    if cache_note is not None:
        lines.append(f"note: {cache_note}")
    return lines


def _data_names(stages: Iterable[Any]) -> set[str]:
    """Names of data that stages ask for, and the tables inside them: an evaluation, a method."""
    names: set[str] = set()
    for stage in stages:
        data = getattr(stage, "data", None)
        names |= {data} if isinstance(data, str) else set()
        inner = [getattr(stage, name) for name in getattr(stage, "__struct_fields__", ())]
        names |= _data_names(value for value in inner if isinstance(value, msgspec.Struct))
    return names


def _models(source: ModelSource, stages: Sequence[PipelineStage]) -> Iterator[ModelSource]:
    """Every model that a program loads: its own, those of load stages, and teachers."""
    yield source
    for stage in stages:
        for name in getattr(stage, "__struct_fields__", ()):
            value = getattr(stage, name)
            if isinstance(value, ModelSource):
                yield value
