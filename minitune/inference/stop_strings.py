"""Stop strings: where a text ends before one, and what of a text that grows is certain."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from minitune.errors import InputError


def stop_string_test(
    decode: Callable[[Sequence[int]], str], stop_strings: Sequence[str]
) -> Callable[[Sequence[int]], bool]:
    """Function that says if a text of tokens, the last one new, holds a stop string."""
    # a token has a byte at least, and a character four at most, so the end of a text that holds a
    # new stop string is this long
    n_tail = 4 * max(map(len, stop_strings), default=0) + 8

    def has_ended(tokens: Sequence[int]) -> bool:
        if not stop_strings or first_stop(decode(tokens[-n_tail:]), stop_strings) is None:
            return False
        return first_stop(decode(tokens), stop_strings) is not None

    return has_ended


def pieces(
    tokens: Iterable[int], decode: Callable[[Sequence[int]], str], stop_strings: Sequence[str]
) -> Iterator[str]:
    """Text of tokens that come one by one, in pieces as soon as each is certain; it ends before the
    first stop string.

    Held back: the bytes of a character that is not complete, and what may be the beginning of a
    stop string. The pieces together are decode(all tokens), cut there. InputError for an empty stop
    string.
    """
    check_stops(stop_strings)
    ids: list[int] = []
    text, shown = "", 0
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        stop = first_stop(text, stop_strings)
        end = _certain(text, stop_strings) if stop is None else stop
        if end > shown:
            yield text[shown:end]
            shown = end
        if stop is not None:
            return
    if len(text) > shown:
        yield text[shown:]


def check_stops(stop_strings: Sequence[str]) -> None:
    """InputError for a stop string that is empty."""
    if "" in stop_strings:
        raise InputError(
            "generate: a stop string is empty, expected at least one character; remove it"
        )


def first_stop(text: str, stop_strings: Sequence[str]) -> int | None:
    """Index at which the first stop string in a text begins."""
    return min((text.find(stop) for stop in stop_strings if stop in text), default=None)


def _certain(text: str, stop_strings: Sequence[str]) -> int:
    """Number of characters of a text that stay as they are, whatever follows."""
    whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
    heads = (
        len(whole) - n
        for stop in stop_strings
        for n in range(1, len(stop))
        if whole.endswith(stop[:n])
    )
    return min(heads, default=len(whole))
