"""EleutherAI's lm-evaluation-harness (lm_eval 0.4) over pure functions, with the numbers of its own
transformers backend.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from minitune.errors import InputError
from minitune.inference import generate
from minitune.inference.sampling import Sampling
from minitune.inference.score import Score, continuations
from minitune.interop.lm_eval_results import plain_results
from minitune.interop.lm_eval_tasks import (
    check,
    index_of,
    quiet,
    refusals,
    without_surroundings,
)
from minitune.models.model import Model
from minitune.text.template import Message, Template, render
from minitune.text.tokenizer import Tokenizer
from minitune.types import Params

BOOTSTRAP = 1000  # resamples for the standard error of a metric that has no formula for it
SEED = 1234  # of what a task asks to be drawn: the harness's own
# the first that a task gives counts
NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DEFAULT_NEW_TOKENS = 256  # the harness's own
DRAWN = ("top_k", "top_p", "min_p")  # 0 is none of them
MARK = "\U0010fffd"  # a private character that shows where a rendered message ends


class _Rules(NamedTuple):
    """Length, stop strings and sampling that a task asks of its answers."""

    max_new_tokens: int
    stop_strings: tuple[str, ...]
    sampling: Sampling


def evaluate(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    template: Template,
    *,
    tasks: Sequence[str],
    include: Path | None,
    n_shots: int | None,
    chat_template: bool,
    system: str | None,
    batch_size: int,
    limit: int | float | None,
    max_length: int | None,
    stop_ids: Sequence[int],
    repetition_penalty: float = 1.0,
) -> dict[str, Any]:
    """{"lm_eval": its version, "tasks": {name: {"metrics": {metric: {"value", "stderr"}},
    "n_samples", "n_shots", "version"}}}.

    tasks: names from the YAML files under the folder `include`, else the harness's own, whose data
    sets are downloaded unless they are in the cache. n_shots: solved examples in front of each
    question, the task's own number if None. limit: documents a task, below 1 a share of them.
    max_length: tokens a row, the model's own limit if None. stop_ids end an answer, as eos does;
    repetition_penalty is for tasks that name none: the folder's own, which transformers applies.
    Python's, numpy's and torch's global generators are seeded, as lm_eval does. InputError for a
    task or data that is not there.
    """
    check(include)
    backend = language_model(
        model,
        params,
        tokenizer,
        template,
        batch_size=batch_size,
        max_length=max_length,
        stop_ids=stop_ids,
        repetition_penalty=repetition_penalty,
    )
    from lm_eval import __version__
    from lm_eval.evaluator import simple_evaluate

    if chat_template and system is not None:
        # The harness drops a system message that the template refuses; here that is an error.
        messages = [{"role": "system", "content": system}, {"role": "user", "content": "?"}]
        render(template, messages, add_generation_prompt=True)
    with quiet() as errors, without_surroundings():
        index = index_of(tasks, include)
        with refusals(tasks, index, errors):
            results = simple_evaluate(
                model=backend,
                tasks=list(tasks),
                task_manager=index,
                num_fewshot=n_shots,
                apply_chat_template=chat_template,
                system_instruction=system,
                limit=limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=False,
            )
    return {"lm_eval": __version__, "tasks": plain_results(results or {})}


def language_model(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    template: Template,
    *,
    batch_size: int,
    max_length: int | None,
    stop_ids: Sequence[int],
    repetition_penalty: float = 1.0,
) -> Any:
    """Model as an lm_eval TemplateLM, for those who want more of its functions than `evaluate`
    returns.
    """
    check(None)
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    eos_id = tokenizer.eos_id
    if eos_id is None:
        raise InputError(
            "lm_eval: the tokenizer has no eos_token, expected one; name it in "
            "tokenizer_config.json"
        )
    prefix_id = eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    n_max = max_length or model.config.max_positions

    def encode(text: str, special: bool | None = None) -> list[int]:
        """Ids of a text; bos goes in front where the tokenizer wants it, but for a rendered chat,
        which brings its own.
        """
        opened = (
            not text.startswith(tokenizer.decode([prefix_id], skip_special=False))
            if special is None
            else special
        )
        bos = [prefix_id] if opened and tokenizer.add_bos and tokenizer.bos_id is not None else []
        return bos + tokenizer.encode(text, parse_special=True)

    def scores(pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        return continuations(model, params, pairs, batch_size=batch_size, max_length=n_max)

    class Adapter(TemplateLM):
        """Interface of the harness, answered by pure functions."""

        @property
        def eot_token_id(self) -> int:
            return eos_id

        @property
        def prefix_token_id(self) -> int:
            return prefix_id

        @property
        def tokenizer_name(self) -> str:
            return tokenizer.fingerprint

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            return encode(string, add_special_tokens)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return template.source if chat_template else None

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return _rendered(template, chat_history, add_generation_prompt)

        def loglikelihood(
            self, requests: Any, disable_tqdm: bool = True
        ) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm)

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return [(score.logp_nats, score.greedy) for score in scores(pairs)]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            windows = []
            for request in requests:
                ids = encode(request.args[0])
                overlapping = utils.get_rolling_token_windows(
                    ids, prefix_id, max_seq_len=n_max, context_len=1
                )
                windows.append([utils.make_disjoint_window(window) for window in overlapping])
            # All windows of all texts are scored in common batches, then added up text by text.
            window_scores = iter(scores([window for text in windows for window in text]))
            return [sum((next(window_scores).logp_nats for _ in text), 0.0) for text in windows]

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            # Requests with the same rules are answered in common batches.
            by_rules: dict[_Rules, list[int]] = {}
            for n, request in enumerate(requests):
                by_rules.setdefault(_rules(request.args[1], n_max, repetition_penalty), []).append(
                    n
                )
            texts: dict[int, str] = {}
            for rules, group in by_rules.items():
                width = n_max - rules.max_new_tokens
                answers = generate.answers(
                    model,
                    params,
                    [(encode(requests[n].args[0]) or [prefix_id])[-width:] for n in group],
                    tokenizer,
                    **rules._asdict(),
                    seed=SEED,
                    batch_size=batch_size,
                    stop_ids=[eos_id, *stop_ids],
                    on_progress=lambda n_answered: None,
                )
                texts |= dict(zip(group, answers, strict=True))
            return [texts[n] for n in range(len(requests))]

    return Adapter()


def _rules(asked: Mapping[str, Any], max_length: int, penalty: float) -> _Rules:
    """Rules of a task's generation_kwargs; InputError for what can't be done here.

    penalty: that of a task which names none.
    """
    known = {*NEW_TOKENS, *DRAWN, "until", "do_sample", "temperature", "repetition_penalty"}
    # 1 changes nothing
    odd = {
        name: value for name, value in asked.items() if name not in known and value not in (None, 1)
    }
    temperature = 0.0 if asked.get("do_sample") is False else asked.get("temperature") or 0.0
    filters = {name: asked[name] for name in DRAWN if asked.get(name) and temperature}
    knobs = {
        "temperature": temperature,
        "repetition_penalty": asked.get("repetition_penalty") or penalty,
        **filters,
    }
    try:
        sampling = msgspec.convert({**knobs, **odd}, Sampling)
    except msgspec.ValidationError as error:
        raise InputError(
            f"lm_eval: a task has generation_kwargs {dict(asked)}: {error}, expected until, "
            "max_gen_toks, do_sample, "
            f"temperature, {', '.join(DRAWN)} or repetition_penalty; copy the task's file and "
            "change it"
        ) from None
    until = asked.get("until") or []
    n_new = int(
        next(
            (asked[name] for name in NEW_TOKENS if asked.get(name) is not None), DEFAULT_NEW_TOKENS
        )
    )
    if not 0 < n_new < max_length:
        raise InputError(
            f"lm_eval: a task asks for {n_new} new tokens, expected 1 to {max_length - 1}: prompt "
            "and answer share max_length"
        )
    return _Rules(
        n_new,
        tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
        sampling,
    )


def _rendered(template: Template, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """Conversation as text, its last turn left open unless a new one is opened; templates that
    refuse system messages get the rest, as in the harness's own backend.
    """
    if not add_generation_prompt:
        messages = [
            *messages[:-1],
            {**messages[-1], "content": messages[-1]["content"] + MARK + " "},
        ]
    try:
        text = render(template, messages, add_generation_prompt=add_generation_prompt)
    except InputError:
        rest = [message for message in messages if message["role"] != "system"]
        if len(rest) == len(messages):
            raise
        text = render(template, rest, add_generation_prompt=add_generation_prompt)
    if add_generation_prompt:
        return text
    text, mark, tail = text.rpartition(MARK)
    if not mark:
        raise InputError(
            f"lm_eval: {template.origin} leaves out what the last message says, expected it for a "
            "task's gen_prefix"
        )
    # the template strips what a message ends with
    return text if tail.startswith(" ") else text.rstrip()
