"""Stages that measure or show: held-out loss and exact match, the EleutherAI harness, answers to
prompts.
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

from minitune.checkpoint.generation_config import other_rules, repetition_penalty
from minitune.checkpoint.tensors import model_bytes, require_finite
from minitune.data.prompts import Prompt, prompts
from minitune.data.supervised import batches, prepare
from minitune.errors import InputError
from minitune.inference.sampling import Sampling
from minitune.inference.score import TokenMetrics, token_metrics
from minitune.interop import lm_eval, lm_eval_tasks
from minitune.interop.lm_eval_model import HarnessModel
from minitune.io import paths
from minitune.programs.data_tables import require_data
from minitune.programs.stages.base import BaseStage, adapted_params
from minitune.programs.stages.batches import describe
from minitune.programs.stages.generate import Answer, answered, conversation_text
from minitune.programs.stages.shown_batches import shown_batches
from minitune.programs.state import AbstractState, PipelineState
from minitune.types import Batch, NonNegativeInt, PositiveInt

ROWS_READ = 8  # for each sample, so that rows without an answer may stand between


class Eval(BaseStage, frozen=True, kw_only=True, tag="eval"):
    """Held-out loss, perplexity and token accuracy and, where the data has answers, exact match by
    greedy decoding.
    """

    observes: ClassVar[bool] = True
    gathers: ClassVar[bool] = True
    shards: ClassVar[bool] = True
    free_keys: ClassVar[tuple[str, ...]] = ("batch_size",)

    data: str  # name of the [data] table to evaluate on
    # rows per forward; as many tokens as a training step takes if absent
    batch_size: PositiveInt | None = None
    max_new_tokens: PositiveInt = 256  # tokens of an answer at most
    limit: PositiveInt | None = None  # prompts to answer; all if absent
    samples: NonNegativeInt = 3  # answers to keep in the record and show

    def check(self, abstract: AbstractState) -> AbstractState:
        """InputError unless the data is there."""
        require_data(abstract, self.data, self.label, "instruct", "chat", "text")
        return abstract

    def prepare(self, abstract: AbstractState) -> list[str]:
        """Notes on the rows that are measured; InputError for a row that can't be."""
        source, (tokenizer, template) = abstract.data[self.data], abstract.text()
        cache, on_sample = paths.cache(), abstract.on_sample(self.data)
        dataset = prepare(source, tokenizer, template, cache, on_sample)
        lines = [f"{self.data} has {describe(dataset.report, self.data, source)}"]
        if source.format != "text":
            lines += self._answer_notes(prompts(source, tokenizer, template, self.limit))
        return lines

    def _answer_notes(self, asked: list[Prompt]) -> list[str]:
        """Lines on answers that exact match can't count; InputError if no row has an answer."""
        answers = [prompt.reference_ids for prompt in asked if prompt.reference]
        if not answers:
            raise InputError(
                f"stages: {self.label} finds no row of {self.data} that ends with an answer, "
                "expected one to compare with; use a generate stage for prompts alone"
            )
        lines = []
        if len(answers) < len(asked):
            n = len(asked) - len(answers)
            of_rows = f"{n:,} of {len(asked):,} rows"
            lines.append(f"{of_rows} end without an answer and are left out of exact match")
        n_long = sum(len(ids) > self.max_new_tokens for ids in answers)
        if n_long:
            of_answers = f"{n_long:,} of {len(answers):,} answers"
            limit = f"max_new_tokens = {self.max_new_tokens}"
            lines.append(f"{of_answers} are longer than {limit} and can't match")
        return lines

    def run(self, state: PipelineState) -> PipelineState:
        """State with a record of loss_nats (per target token), perplexity, token_accuracy (target
        tokens that were the most likely ones), bytes of the model, and exact_match (fraction of
        answers equal to the reference).
        """
        if self.label in state.records:  # a resumed run: this was measured before the run died
            return state
        source, loaded = state.data[self.data], state.loaded
        dataset = prepare(source, loaded.tokenizer, loaded.template, paths.cache())
        description = describe(dataset.report, self.data, source)
        state.log.say(f"{self.label}: {self.data} has {description}")
        n_rows = self.batch_size or state.rows_at_once(source.max_seq_len)
        all_rows = batches(dataset, source, n_rows)
        metrics = self._measure(state, all_rows, dataset.report.n_tokens)
        record: dict[str, Any] = {
            "loss_nats": metrics.loss_nats,
            "perplexity": metrics.perplexity,
            "token_accuracy": metrics.accuracy,
            "target_tokens": metrics.n_targets,
            "n_rows": dataset.report.n_samples,
            "n_dropped": dataset.report.n_dropped
            + dataset.report.n_cut_off
            + dataset.report.n_without_target,
            "model_bytes": model_bytes(loaded.params, loaded.trainable, loaded.stored),
        }
        exact_match = ""
        if source.format != "text":
            record |= self._answer(state)
            exact_match = f", exact match {record['exact_match']:.1%} of {record['n_prompts']}"
        state.log.say(
            f"{self.label}: loss {metrics.loss_nats:.4f} nats a token, perplexity "
            f"{metrics.perplexity:.3f}, token accuracy {metrics.accuracy:.1%}{exact_match}"
        )
        return state.record(self.label, record)

    def _measure(self, state: PipelineState, rows: Iterator[Batch], n_tokens: int) -> TokenMetrics:
        """Metrics on all rows; InputError for a loss that is not finite."""
        params = adapted_params(state)
        with shown_batches(state.log, f"{self.label} loss", rows, n_tokens) as shown:
            metrics = token_metrics(state.loaded.model, params, shown)
        if not math.isfinite(metrics.loss_nats):
            require_finite(params, f"stages: {self.label}")
            raise InputError(
                f"stages: {self.label} has a loss of {metrics.loss_nats} nats a token, expected a "
                "number; has the training diverged?"
            )
        return metrics

    def _answer(self, state: PipelineState) -> dict[str, Any]:
        loaded = state.loaded
        rows = prompts(state.data[self.data], loaded.tokenizer, loaded.template, self.limit)
        for line in self._answer_notes(rows):
            state.log.say(f"{self.label}: {line}")
        pairs = self._answered(state, rows, self.label)
        n_right = sum(reply.text.strip() == prompt.reference.strip() for prompt, reply in pairs)
        samples = [_sample(prompt, reply) for prompt, reply in pairs[: self.samples]]
        return {"exact_match": n_right / len(pairs), "n_prompts": len(pairs), "samples": samples}

    def first_samples(self, state: PipelineState, label: str) -> list[dict[str, str]]:
        """Answers of a model to the prompts that this stage shows; label: of the stage that asks.

        Of a table whose first rows end without an answer there may be fewer.
        """
        loaded, n_read = state.loaded, ROWS_READ * self.samples
        source, text = state.data[self.data], (loaded.tokenizer, loaded.template)
        rows = prompts(source, *text, min(n_read, self.limit or n_read))
        shown = [prompt for prompt in rows if prompt.reference][: self.samples]
        return [_sample(*pair) for pair in self._answered(state, shown, label)]

    def _answered(
        self, state: PipelineState, rows: list[Prompt], label: str
    ) -> list[tuple[Prompt, Answer]]:
        """Prompts that have a reference, with the model's likeliest answers."""
        asked = [prompt for prompt in rows if prompt.reference]
        ids = [prompt.ids for prompt in asked]
        limits = self.batch_size, self.max_new_tokens
        replies = answered(state, label, ids, Sampling(), *limits, ())
        return list(zip(asked, replies, strict=True))


def _sample(prompt: Prompt, reply: Answer) -> dict[str, str]:
    """Entry of a record for a prompt and its answer."""
    return {
        "prompt": conversation_text(prompt.messages),
        "reference": prompt.reference,
        "answer": reply.shown,
    }


class Harness(BaseStage, frozen=True, kw_only=True, tag="harness"):
    """Tasks of EleutherAI's lm-evaluation-harness (extra `eval`)."""

    observes: ClassVar[bool] = True
    gathers: ClassVar[bool] = True
    shards: ClassVar[bool] = True
    free_keys: ClassVar[tuple[str, ...]] = ("batch_size",)

    tasks: tuple[str, ...]  # names of tasks, as the harness has them
    include: str | None = None  # a folder of task files
    # solved examples before each question; each task's own if absent
    n_shots: NonNegativeInt | None = None
    chat_template: bool = False  # ask in the chat format of the model
    system: str | None = None  # system message before each question
    batch_size: PositiveInt = 16  # requests per forward
    limit: PositiveInt | None = None  # samples a task; all if absent
    # tokens of a row at most; what the model was made for if absent
    max_length: PositiveInt | None = None

    def check(self, abstract: AbstractState) -> AbstractState:
        """InputError unless the extra is installed and there are such tasks, which it can run."""
        lm_eval_tasks.check(paths.locate(self.include) if self.include else None, self.tasks)
        return abstract

    def run(self, state: PipelineState) -> PipelineState:
        """State with a record of every task's metrics."""
        if self.label in state.records:
            return state
        loaded = state.loaded
        penalty = 1.0
        if loaded.source is not None:
            penalty = repetition_penalty(loaded.source)
            others = other_rules(loaded.source)
            if others:
                names = ", ".join(others)
                state.log.say(f"{self.label}: {names} of generation_config.json is not applied")
        asked = HarnessModel(
            loaded.model,
            adapted_params(state),
            loaded.tokenizer,
            loaded.template,
            self.batch_size,
            loaded.stop_ids,
            self.max_length,
            penalty,
        )
        results = lm_eval.evaluate(
            asked,
            tasks=self.tasks,
            include=paths.locate(self.include) if self.include else None,
            n_shots=self.n_shots,
            chat_template=self.chat_template,
            system=self.system,
            limit=self.limit,
        )
        for task, result in results["tasks"].items():
            values = "  ".join(
                f"{name} {metric['value']:.4f}" for name, metric in result["metrics"].items()
            )
            state.log.say(f"{self.label}: {task} ({result['n_samples']} samples)  {values}")
        return state.record(self.label, results)
