"""Part of a page on sample answers, with what differs from the reference marked."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

from minitune.programs.records import Sample, StageRecord

LEGEND = (
    "Marked words are not those of the reference, struck-out ones are missing, and a green answer "
    "equals it"
)


class Column(NamedTuple):
    """Answers of one model."""

    title: str
    samples: Sequence[Sample]


def samples_parts(records: Mapping[str, StageRecord]) -> list[str]:
    """Answers of each model side by side, with what differs from the reference marked."""
    shown = columns(records)
    if not shown:
        return []
    notes = [f'<p class="dim">{escape(text)}</p>' for text in (*_best_notes(records), LEGEND)]
    parts = ["<h2>Samples</h2>", *notes]
    for sample in shown[0].samples:
        asked = (("prompt", str(sample.prompt)), ("reference", sample.reference))
        cells = "".join(f"<tr><td>{name}</td><td>{escape(text)}</td></tr>" for name, text in asked)
        answers = "".join(
            f'<div><p class="dim">{escape(column.title)}</p>'
            f"<p>{_marked(other.answer, sample.reference)}</p></div>"
            for column in shown
            for other in column.samples
            if other.prompt == sample.prompt
        )
        parts.append(
            f'<div class="sample"><table>{cells}</table><div class="answers">{answers}</div></div>'
        )
    return parts


def columns(records: Mapping[str, StageRecord]) -> list[Column]:
    """Answers of the evaluations in their order, with those of the training state that did not go
    on: the best before the last, as their steps are.
    """
    found: list[Column] = []
    beside: list[Column] = []  # waits for the next evaluation
    which = ""  # of the two states the evaluations measure
    for name, record in records.items():
        other = record.other_answers
        if record.best_step is not None:
            found, beside, which = [*found, *beside], [], ""
        if other is not None and other.state == "best":
            found.append(Column(f"best of {name}: step {other.step:,}", other.samples))
            which = f" (last: step {record.steps:,})"
        elif other is not None:
            beside = [Column(f"last of {name}: step {other.step:,}", other.samples)]
            which = f" (best: step {record.best_step:,})"
        if record.samples:
            found += [Column(f"{name}{which}", record.samples), *beside]
            beside = []
    return [*found, *beside]


def _best_notes(records: Mapping[str, StageRecord]) -> Iterator[str]:
    """Yield for each training stage which of its states was the best, and which one went on."""
    for name, record in records.items():
        best, last, other = record.best_step, record.steps, record.other_answers
        if best is None or record.best_heldout_nats is None:
            continue
        if best == last:
            yield f"{name}: the best held-out loss is that of the last step, {last:,}"
        elif other is not None:
            goes_on = "the best" if other.state == "last" else "the last"
            yield (
                f"{name}: step {best:,} has the best held-out loss, {last:,} is the last step; "
                f"{goes_on} of the two went on, and the answers of the other stand beside"
            )


def _marked(answer: str, reference: str) -> str:
    """Answer as HTML, with the words that differ from the reference marked, and those of it that
    are missing struck out."""
    if answer == reference:
        return f'<span class="same">{escape(answer)}</span>'
    words, wanted = _words(answer), _words(reference)
    matcher = difflib.SequenceMatcher(None, wanted, words, autojunk=False)
    parts = []
    for kind, start, stop, first, end in matcher.get_opcodes():
        text = escape("".join(words[first:end]))
        if kind == "delete":
            parts.append(f"<del>{escape(''.join(wanted[start:stop]))}</del>")
        else:
            parts.append(text if kind == "equal" else f"<mark>{text}</mark>")
    return "".join(parts)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", text)
