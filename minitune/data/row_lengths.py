"""Row lengths that data decides: seq_len = "auto" is as many tokens as the longest row has."""

from pathlib import Path

import msgspec

from minitune.data import preference, supervised
from minitune.data.source import PREFERENCE_FORMATS, Source
from minitune.data.supervised import cache_key
from minitune.data.token_store import OnSample, Report, no_one
from minitune.io import array_cache
from minitune.text.template import Template
from minitune.text.tokenizer import Tokenizer

AUTO = "auto"
MOST_TOKENS = 4096  # that "auto" takes; longer rows want a user who knows that there is memory
MULTIPLE = 64  # that a length is rounded up to
PACKED_TOKENS = 1024  # of a packed row at least, so that short documents find company


def with_length(
    source: Source,
    tokenizer: Tokenizer,
    template: Template,
    cache: Path,
    max_positions: int,
    on_sample: OnSample = no_one,
) -> tuple[Source, Report]:
    """(source with its seq_len decided, report of its tokens).

    The table is tokenized once, at the largest length. Where no row is longer than the length that
    is decided, the same tokens stand in the cache for that too. InputError as in `prepare`.
    """
    most = min(MOST_TOKENS, max_positions)
    widest = msgspec.structs.replace(source, seq_len=most)
    kind = preference if source.format in PREFERENCE_FORMATS else supervised
    report = kind.prepare(widest, tokenizer, template, cache, on_sample).report
    length = rounded(report.longest, source.packed, most)
    decided = msgspec.structs.replace(source, seq_len=length)
    if length < most:
        keys = (cache_key(one, tokenizer, template) for one in (widest, decided))
        array_cache.share(*(cache / key for key in keys))
    return decided, report


def rounded(longest: int, packed: bool, most: int) -> int:
    """Tokens of a row where the longest document has `longest`: a multiple of 64, `most` at
    most."""
    least = PACKED_TOKENS if packed else 1
    return min(most, -(-max(longest, least) // MULTIPLE) * MULTIPLE)


def length_line(table: str, source: Source, report: Report) -> str:
    """Line on the length that was decided for a data table, and on what is longer."""
    decided = f"data.{table}.seq_len = {source.max_seq_len:,}"
    longest = f"the longest row has {report.longest:,} tokens"
    n_cut = report.n_truncated + report.n_dropped + report.n_cut_off + report.n_split
    if not n_cut:
        return f'{decided} ("auto"): {longest}'
    what = {"truncate": "cut", "drop": "left out", "split": "split"}[source.overlong]
    longer = f"{n_cut:,} rows are longer and {what}"
    if source.overlong != "split":
        longer += f", {longest}"
    most = f"the most that it takes is {MOST_TOKENS:,}, or the positions of the model"
    return f'{decided} ("auto"): {longer}; {most}; write data.{table}.seq_len for another'
