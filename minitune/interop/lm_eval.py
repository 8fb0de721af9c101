"""EleutherAI's lm-evaluation-harness (lm_eval 0.4) over pure functions, with the numbers of its own
transformers backend.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitune.interop.lm_eval_model import HarnessModel, rendered
from minitune.interop.lm_eval_results import plain_results
from minitune.interop.lm_eval_tasks import check, index_of, quiet, refusals, without_surroundings
from minitune.text.template import render

BOOTSTRAP = 1000  # resamples for the standard error of a metric that has no formula for it


def evaluate(
    model: HarnessModel,
    *,
    tasks: Sequence[str],
    include: Path | None,
    n_shots: int | None,
    chat_template: bool,
    system: str | None,
    limit: int | float | None,
) -> dict[str, Any]:
    """{"lm_eval": its version, "tasks": {name: {"metrics": {metric: {"value", "stderr"}},
    "n_samples", "n_shots", "version"}}}.

    tasks: names from the YAML files under `include`, else the harness's own, whose data sets are
    downloaded unless they are in the cache. n_shots: solved examples in front of each question, the
    task's own number if None. limit: documents a task, below 1 a share of them. lm_eval seeds the
    global generators of Python, numpy and torch. InputError for a task or data that is not there.
    """
    check(include)
    backend = language_model(model)
    if chat_template and system is not None:
        _require_system_turn(model, system)
    from lm_eval import __version__
    from lm_eval.evaluator import simple_evaluate

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


def _require_system_turn(model: HarnessModel, system: str) -> None:
    """InputError for a template that refuses a system message: the harness would drop it."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "?"}]
    render(model.template, messages, add_generation_prompt=True)


def language_model(model: HarnessModel) -> Any:
    """Model as an lm_eval TemplateLM; InputError for a tokenizer that has no eos."""
    check(None)
    eos_id = model.eos_id
    from lm_eval.api.model import TemplateLM

    class Adapter(TemplateLM):
        """Interface of the harness, answered by pure functions."""

        eot_token_id = property(lambda self: eos_id)  # pyright: ignore[reportIncompatibleMethodOverride]
        prefix_token_id = property(lambda self: model.prefix_id)  # pyright: ignore[reportIncompatibleMethodOverride]
        tokenizer_name = property(lambda self: model.tokenizer.fingerprint)  # pyright: ignore[reportIncompatibleMethodOverride]

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            return model.encode(string, add_special_tokens)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return model.template.source if chat_template else None

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return rendered(model.template, chat_history, add_generation_prompt)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm)

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return [(score.logp_nats, score.greedy) for score in model.scores(pairs)]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            return _text_logps_nats(model, [request.args[0] for request in requests])

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            return model.answers([request.args for request in requests])

    return Adapter()


def _text_logps_nats(model: HarnessModel, texts: Sequence[str]) -> list[float]:
    """log p of whole texts in nats, each read in windows of the model's length."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    windows = []
    for text in texts:
        overlapping = get_rolling_token_windows(
            model.encode(text), model.prefix_id, max_seq_len=model.n_max, context_len=1
        )
        windows.append([make_disjoint_window(window) for window in overlapping])
    # All windows of all texts are scored in common batches, then added up text by text.
    scores = iter(model.scores([window for of_text in windows for window in of_text]))
    return [sum((next(scores).logp_nats for _ in of_text), 0.0) for of_text in windows]
