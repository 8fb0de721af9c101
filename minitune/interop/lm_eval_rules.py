"""Rules that a task of the harness sets for its answers: length, stop strings and sampling."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from minitune.errors import InputError
from minitune.inference.sampling import Sampling

# the first that a task gives counts
NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DEFAULT_NEW_TOKENS = 256  # the harness's own
DRAWN = ("top_k", "top_p", "min_p")  # 0 is none of them
KNOWN = frozenset({*NEW_TOKENS, *DRAWN, "until", "do_sample", "temperature", "repetition_penalty"})


class AnswerRules(NamedTuple):
    """Length, stop strings and sampling that a task asks of its answers."""

    max_new_tokens: int
    stop_strings: tuple[str, ...]
    sampling: Sampling


def answer_rules(asked: Mapping[str, Any], max_length: int, penalty: float) -> AnswerRules:
    """Rules of a task's generation_kwargs; InputError for what can't be done here.

    max_length: tokens of prompt and answer together. penalty: that of a task which names none.
    """
    sampling = _sampling(asked, penalty)
    until = asked.get("until") or []
    stops = [until] if isinstance(until, str) else until
    given = (asked[name] for name in NEW_TOKENS if asked.get(name) is not None)
    n_new = int(next(given, DEFAULT_NEW_TOKENS))
    if not 0 < n_new < max_length:
        raise InputError(
            f"lm_eval: a task asks for {n_new} new tokens, expected 1 to {max_length - 1}: prompt "
            "and answer share max_length"
        )
    return AnswerRules(n_new, tuple(stop for stop in stops if stop), sampling)


def _sampling(asked: Mapping[str, Any], penalty: float) -> Sampling:
    """Sampling of a task's generation_kwargs, in which a filter without a temperature says nothing.

    InputError for a name that is not known, unless its value changes nothing: None or 1.
    """
    others = {name: value for name, value in asked.items() if name not in KNOWN}
    odd = {name: value for name, value in others.items() if value not in (None, 1)}
    temperature = 0.0 if asked.get("do_sample") is False else asked.get("temperature") or 0.0
    filters = {name: asked[name] for name in DRAWN if asked.get(name) and temperature}
    knobs = {
        "temperature": temperature,
        "repetition_penalty": asked.get("repetition_penalty") or penalty,
        **filters,
    }
    try:
        return msgspec.convert({**knobs, **odd}, Sampling)
    except msgspec.ValidationError as error:
        raise InputError(
            f"lm_eval: a task has generation_kwargs {dict(asked)}: {error}, expected until, "
            f"max_gen_toks, do_sample, temperature, {', '.join(DRAWN)} or repetition_penalty; copy "
            "the task's file and change it"
        ) from None
