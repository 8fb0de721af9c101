"""Facts on the data of a program, from its tokens and its template and without a weight: what
`minitune data` prints, and what a run leaves in data.json for its page.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from minitune.data import preference, supervised
from minitune.data.conversations import messages, tools
from minitune.data.readers import rows_with_location
from minitune.data.source import PREFERENCE_FORMATS, Source
from minitune.data.table_facts import (
    MOST_COMPARED,
    Lengths,
    Overlap,
    Samples,
    lengths,
    n_repeated,
    overlap,
)
from minitune.errors import InputError
from minitune.io import paths
from minitune.programs.check import measured_pairs, measured_tables, trained_tables
from minitune.programs.stages.batches import left_out
from minitune.programs.state import AbstractState
from minitune.text.template import Message, Template, Tool, with_options
from minitune.text.template_check import TemplateCheck, template_check

FILE = "data.json"  # of a run folder
FEW_TARGETS = 0.02  # share of tokens below which a table is told


class TableFacts(msgspec.Struct, frozen=True):
    """Facts on one [data] table, as it is trained on."""

    path: str
    format: str
    seq_len: int
    n_samples: int
    n_tokens: int
    n_target_tokens: int
    n_rows: int  # of an epoch
    left_out: dict[str, int]  # words for the reason -> samples
    lengths: Lengths
    n_repeated: int | None  # samples that repeat an earlier one; null: too many to compare
    fill: float | None = None  # share of a packed row that is no padding
    template: TemplateCheck | None = None  # of tables of conversations
    turns: str = "whole"


class DataFacts(msgspec.Struct, frozen=True):
    """Facts on the tables that a program trains and measures on."""

    tables: dict[str, TableFacts]
    overlaps: tuple[Overlap, ...] = ()

    def notes(self) -> list[str]:
        """Sentences on what looks unintended, each with what to do; none if nothing does."""
        of_tables = (note for name, one in self.tables.items() for note in _table_notes(name, one))
        return [*of_tables, *filter(None, map(_overlap_note, self.overlaps))]


def data_facts(abstract: AbstractState, stages: Sequence[Any], seed: int) -> DataFacts:
    """Facts on the tables that the stages train and measure on; their tokens come from the cache.

    abstract: the state before the first stage, the lengths of rows decided.
    """
    tables, samples = {}, {}
    for name in dict.fromkeys([*trained_tables(stages), *measured_tables(stages)]):
        tables[name], samples[name] = _facts(name, abstract, seed)
    found = [
        overlap((trained, samples[trained]), (measured, samples[measured]))
        for trained, measured in measured_pairs(stages)
    ]
    return DataFacts(tables, tuple(one for one in found if one is not None))


def read_facts(folder: Path) -> DataFacts | None:
    """Facts that a run has left in its folder; None where there are none, or of another version."""
    try:
        return msgspec.json.decode((folder / FILE).read_bytes(), type=DataFacts)
    except (OSError, msgspec.DecodeError):
        return None


def _facts(name: str, abstract: AbstractState, seed: int) -> tuple[TableFacts, Samples]:
    """(facts on a table, its samples)."""
    source, text = abstract.data[name], abstract.text()
    how = (source, *text, paths.cache(), abstract.on_sample(name))
    fill = None
    if source.format in PREFERENCE_FORMATS:
        answers = preference.prepare(*how)
        documents, report, order = answers.answers, answers.report, answers.order
    else:
        dataset = supervised.prepare(*how)
        documents = supervised.Documents(dataset.tokens, dataset.mask, dataset.offsets)
        report, order = dataset.report, dataset.order
        fill = dataset.fill(source, seed) if source.packed else None
    samples = Samples(documents, 2 if source.format == "pairs" else 1)
    facts = TableFacts(
        source.path_names,
        source.format,
        source.max_seq_len,
        report.n_samples,
        report.n_tokens,
        report.n_target_tokens,
        len(order(seed, 0)),
        left_out(report, name, source),
        lengths(documents),
        n_repeated(samples),
        fill,
        _template_facts(source, text[1]),
        source.turns,
    )
    return facts, samples


def _template_facts(source: Source, template: Template) -> TemplateCheck | None:
    """Check of the template on the conversations of a table; None for other rows."""
    if source.format not in ("instruct", "chat"):
        return None
    template = with_options(template, source.chat_template_kwargs, source.path_names)
    return template_check(template, _conversations(source))


def _conversations(source: Source) -> Iterator[tuple[Sequence[Message], Sequence[Tool]]]:
    """Yield the conversations of a table's own file; rows that hold none are left out."""
    for where, row in rows_with_location(source):
        if isinstance(row, InputError):
            continue
        try:
            conversation = messages(row, source, where)
            functions = tools(row, source, where)
        except InputError:
            continue
        yield conversation, functions


def _table_notes(name: str, facts: TableFacts) -> Iterator[str]:
    """Yield what looks unintended in a table."""
    if facts.n_repeated is None:
        yield f"{name} has more than {MOST_COMPARED:,} samples: none were compared with others"
    elif facts.n_repeated:
        share = facts.n_repeated / facts.n_samples
        yield (
            f"{facts.n_repeated:,} of the {facts.n_samples:,} samples of {name} ({share:.1%}) "
            "repeat another one token by token; remove them, or they count twice"
        )
    if facts.n_target_tokens < FEW_TARGETS * facts.n_tokens:
        yield (
            f"{facts.n_target_tokens / facts.n_tokens:.1%} of the tokens of {name} are trained; "
            "short answers to long prompts learn slowly: `show-sample` shows which they are"
        )
    template = facts.template
    if template is not None and template.n_rewritten and facts.turns == "whole":
        yield (
            f"the template writes an earlier answer differently once another follows, in "
            f"{template.n_rewritten:,} of {template.n_with_history:,} conversations of {name} with "
            f'more than one answer; data.{name}.turns = "each" trains each answer as it is served'
        )
    if template is not None and template.n_prompted:
        yield (
            f"the template ends {template.n_prompted:,} of {template.n_conversations:,} "
            f"conversations of {name} with a prompt that was not asked for; it is left out of "
            "training, and a corrected template would not write it"
        )


def _overlap_note(one: Overlap) -> str | None:
    """Words on measured samples that are trained on, or None."""
    of_all = f"of the {one.n_samples:,} samples of {one.measured}"
    if one.n_equal:
        return (
            f"{one.n_equal:,} {of_all} stand in {one.trained} token by token, so that what is "
            "measured was trained on; remove them from one of the two"
        )
    if one.n_equal_prompts:
        return (
            f"{one.n_equal_prompts:,} {of_all} have a prompt that {one.trained} holds too, with "
            "another answer; what is measured there is partly memory"
        )
    return None
