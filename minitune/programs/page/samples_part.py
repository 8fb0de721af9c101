"""Part of a page on sample answers, with what differs from the reference marked."""

import difflib
import re
from collections.abc import Mapping
from html import escape

from minitune.programs.records import StageRecord


def samples_parts(records: Mapping[str, StageRecord]) -> list[str]:
    """Answers of the evaluations beside the reference, with what differs from it marked."""
    evaluations = {name: record.samples for name, record in records.items() if record.samples}
    if not evaluations:
        return []
    parts = ["<h2>Samples</h2>"]
    for sample in next(iter(evaluations.values())):
        rows = [("prompt", escape(str(sample.prompt))), ("reference", escape(sample.reference))]
        for name, samples in evaluations.items():
            answers = [other.answer for other in samples if other.prompt == sample.prompt]
            rows += [(name, _marked(answer, sample.reference)) for answer in answers]
        cells = "".join(f"<tr><td>{escape(name)}</td><td>{text}</td></tr>" for name, text in rows)
        parts.append(f'<table class="sample">{cells}</table>')
    return parts


def _marked(answer: str, reference: str) -> str:
    """Answer as HTML, with the words that differ from the reference marked."""
    if answer == reference:
        return f'<span class="same">{escape(answer)}</span>'
    words, wanted = _words(answer), _words(reference)
    matcher = difflib.SequenceMatcher(None, wanted, words, autojunk=False)
    parts = []
    for kind, _, _, first, end in matcher.get_opcodes():
        text = escape("".join(words[first:end]))
        parts.append(text if kind == "equal" else f"<mark>{text}</mark>")
    return "".join(parts).replace("<mark></mark>", "")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", text)
