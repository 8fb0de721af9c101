"""Checks of a program before anything expensive: folders, stages, and the data as they use it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from minitune.checkpoint.hf_weights import check_weights
from minitune.data import row_lengths
from minitune.data.readers import require_rows
from minitune.data.source import Source
from minitune.errors import InputError
from minitune.io import paths
from minitune.io.paths import locate
from minitune.models.model import Model
from minitune.models.open import FAMILIES
from minitune.models.open import open as open_model
from minitune.programs.data_paths import located, refreshed
from minitune.programs.loading import ModelSource, abstract_state
from minitune.programs.model_paths import fetched_models, models_of
from minitune.programs.progress import Count
from minitune.programs.stages.evaluate import Eval
from minitune.programs.stages.train import Train
from minitune.programs.state import AbstractState, DataStage, PipelineStage, trainable_like
from minitune.text.template import Template, with_options


class Checked(NamedTuple):
    """Findings on a program."""

    lines: list[str]  # what it would work on
    data: dict[str, Source]  # its tables, the lengths of their rows decided
    lengths: list[str]  # lines on lengths that were "auto"
    first: AbstractState  # before the first stage


def check(
    source: ModelSource,
    sources: Mapping[str, Source],
    stages: Sequence[PipelineStage],
    say: Callable[[str], None] = lambda _: None,
) -> Checked:
    """Findings on a program; InputError for whatever would stop it later.

    The data is tokenized for the stages that will use it, and stays in the cache. Of weights only
    the headers are read. say: writes a line, now and then while a large table is tokenized.
    """
    fetched = refreshed(
        path for data in sources.values() for path in data.paths_by_key("").values()
    )
    fetched += fetched_models(models_of(source, stages), say)
    placed = {name: located(data) for name, data in sources.items()}
    abstract = abstract_state(source, AbstractState(placed, Model(FAMILIES["llama"], None), {}))
    abstract = abstract._replace(on_sample=lambda name: Count(say, f"tokenizing {name}"))
    _, template = abstract.text()
    lines = _model_lines(abstract)
    for model in models_of(source, stages):
        if model.path is not None and not model.path.startswith("run/"):
            check_weights(locate(model.path), open_model(locate(model.path)).shapes())
    lines += [*fetched, *_data_lines(placed, template), *data_notes(source, sources, stages)]

    # All that costs nothing comes first: rows are read once every stage has found its place.
    before = _states_before(stages, abstract)
    decided, lengths = with_lengths(placed, abstract)
    lines += [*lengths, *_stage_lines(stages, before, decided)]
    seq_lens = {name: data.max_seq_len for name, data in decided.items()}
    data = {n: msgspec.structs.replace(one, seq_len=seq_lens[n]) for n, one in sources.items()}
    return Checked(lines, data, lengths, abstract._replace(data=decided))


def _stage_lines(
    stages: Sequence[PipelineStage],
    before: Sequence[AbstractState],
    data: Mapping[str, Source],
) -> Iterator[str]:
    """Yield lines on each stage and on the rows that it reads, which are tokenized for it."""
    for stage, found in zip(stages, before, strict=True):
        yield f"stage: {stage.label}"
        if isinstance(stage, DataStage):
            yield from (f"  {note}" for note in stage.prepare(found._replace(data=data)))


def _model_lines(abstract: AbstractState) -> list[str]:
    """Lines on the size of a model and on its chat template."""
    _, template = abstract.text()
    n_params = sum(w.numel() for w in abstract.params.values())
    vocabulary = abstract.model.config.vocab_size
    sizes = f"{n_params:,} parameters, vocabulary {vocabulary:,}"
    lines = [f"model: {sizes}, template: {template.origin}"]
    if template.tool_use is not None:
        lines.append(f"template: {template.tool_use.origin} for conversations with tools")
    return lines


def _data_lines(placed: Mapping[str, Source], template: Template) -> Iterator[str]:
    """Yield a line on each table; InputError for files without rows, and for options that the
    template does not know."""
    for name, data in placed.items():
        for part in data.parts():
            require_rows(part)
            with_options(template, part.chat_template_kwargs, part.path_names)
        yield f"data: {name} is {', '.join(map(_read_as, data.parts()))}"


def with_lengths(
    placed: Mapping[str, Source], abstract: AbstractState
) -> tuple[dict[str, Source], list[str]]:
    """(data tables whose rows have a length in numbers, lines on those that had none)."""
    decided, lines = dict(placed), []
    max_positions = abstract.model.config.max_positions
    for name, source in placed.items():
        if source.seq_len == "auto":
            how = (*abstract.text(), paths.cache(), max_positions, abstract.on_sample(name))
            decided[name], report = row_lengths.with_length(source, *how)
            lines.append(row_lengths.length_line(name, decided[name], report))
    return decided, lines


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
    _refuse_shared_rows(stages, abstract.data)
    return before


def trained_tables(stages: Sequence[Any]) -> list[str]:
    """Names of the tables that stages train on, each once."""
    return list(dict.fromkeys(stage.data for stage in stages if isinstance(stage, Train)))


def measured_tables(stages: Sequence[Any]) -> list[str]:
    """Names of the tables that stages measure a loss on, each once."""
    training = [stage for stage in stages if isinstance(stage, Train)]
    measured = [stage.evaluate.data for stage in training if stage.evaluate is not None]
    measured += [stage.data for stage in stages if isinstance(stage, Eval)]
    return list(dict.fromkeys(measured))


def measured_pairs(stages: Sequence[Any]) -> list[tuple[str, str]]:
    """(table that a stage trains on, another table that a stage measures on), each pair once."""
    pairs = product(trained_tables(stages), measured_tables(stages))
    return [(trained, measured) for trained, measured in pairs if trained != measured]


def _refuse_shared_rows(stages: Sequence[PipelineStage], placed: Mapping[str, Source]) -> None:
    """InputError where a stage measures on another table that holds rows of a training stage's."""
    for trained, name in measured_pairs(stages):
        shared = _shared_file(placed[trained], placed[name])
        if shared is not None:
            raise InputError(
                f"check: data.{trained} and data.{name} both read {shared}, so that what is "
                f"measured was trained on, expected other rows; write data.{trained}.holdout=0.05 "
                f"in place of data.{name}.path, or measure the training rows by their own name, "
                f'data = "{trained}"'
            )


def _shared_file(train: Source, heldout: Source) -> Path | None:
    """File of which two tables read the same rows, or None."""
    for one in train.parts():
        for other in heldout.parts():
            split, across = one.split, other.split
            if split and across and split.fraction == across.fraction and split != across:
                continue
            files = {file.resolve() for file in one.files()}
            shared = next((file for file in other.files() if file.resolve() in files), None)
            if shared is not None:
                return shared
    return None


def data_notes(
    source: ModelSource, sources: Mapping[str, Source], stages: Sequence[Any]
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
