"""Stages that measure or show: held-out loss and exact match, the EleutherAI harness, answers to prompts."""

import json
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from minitune import tree
from minitune.data.prompts import prompts
from minitune.data.source import Source
from minitune.data.supervised import batches, prepare
from minitune.hardware import to_device, widest_float
from minitune.inference.generate import answers
from minitune.inference.sampling import Sampling
from minitune.interop import lm_eval
from minitune.io import paths
from minitune.io.atomic import write_atomic
from minitune.io.results import Result
from minitune.losses.token import cross_entropy
from minitune.models.compile import wrap
from minitune.models.model import Model
from minitune.programs.loading import asked_data
from minitune.programs.stages.base import BaseStage, adapted_params
from minitune.programs.state import AbstractState, PipelineState, Stopped
from minitune.text.chat import stop_ids
from minitune.types import Batch, NonNegativeInt, Params, PositiveInt


class Eval(BaseStage, frozen=True, kw_only=True, tag="eval"):
    """Held-out loss, perplexity and token accuracy and, where the data has answers, exact match by greedy decoding."""

    data: str
    batch_size: PositiveInt = 64  # rows per forward
    max_new_tokens: PositiveInt = 256
    limit: PositiveInt | None = None  # prompts to answer; all if absent
    samples: NonNegativeInt = 3  # answers to keep in the record and show

    def check(self, abstract: AbstractState) -> AbstractState:
        """The data is there."""
        asked_data(abstract, self.data, self.label, "instruct", "chat", "text")
        return abstract

    def run(self, state: PipelineState) -> PipelineState:
        """state with a record of loss_nats (per target token), perplexity, token_accuracy (target tokens that were the most
        likely ones), bytes of the model, and exact_match (fraction of answers equal to the reference)."""
        if self.label in state.records:  # a resumed run: this was measured before the run died
            return state
        source, loaded = state.data[self.data], state.loaded
        dataset = prepare(source, loaded.tokenizer, loaded.template, paths.cache())
        params = adapted_params(state)
        sums = [_sums(loaded.model, params, batch) for batch in batches(dataset, source, self.batch_size)]
        # nats, right ones, how many: added up on the host in float64, which an accelerator may lack
        total = sum(torch.stack(sums).to("cpu", torch.float64).unbind(), torch.zeros(3, dtype=torch.float64))
        nats, right = (total[:2] / total[2].clamp(min=1.0)).tolist()
        record: dict[str, Any] = {
            "loss_nats": nats,
            "perplexity": math.exp(min(nats, 700.0)),  # beyond that it is no float
            "token_accuracy": right,
            "target_tokens": int(total[2]),
            "model_bytes": model_bytes(state),
        }
        if source.format != "text":
            record |= self._answer(state, source)
        shown = f", exact match {record['exact_match']:.1%} of {record['n_prompts']}" if "exact_match" in record else ""
        state.log.say(
            f"{self.label}: loss {record['loss_nats']:.4f} nats a token, perplexity {record['perplexity']:.3f}, "
            f"token accuracy {record['token_accuracy']:.1%}{shown}"
        )
        return state.record(self.label, record)

    def _answer(self, state: PipelineState, source: Source) -> dict[str, Any]:
        asked = prompts(source, state.loaded.tokenizer, state.loaded.template)[: self.limit]
        found = answered(state, self.label, [one.ids for one in asked], Sampling(), self.batch_size, self.max_new_tokens, ())
        right = [answer.strip() == prompt.reference.strip() for answer, prompt in zip(found, asked, strict=True)]
        samples = [
            {"prompt": prompt.messages[-1]["content"], "reference": prompt.reference, "answer": answer}
            for prompt, answer in zip(asked[: self.samples], found, strict=False)
        ]
        return {"exact_match": sum(right) / len(right), "n_prompts": len(right), "samples": samples}


class Generate(BaseStage, frozen=True, kw_only=True, tag="generate"):
    """Answer the prompts of a data file, and write {"prompt", "answer"} lines to answers.jsonl in the run folder."""

    data: str
    sampling: Sampling = Sampling()
    max_new_tokens: PositiveInt = 256
    stop: tuple[str, ...] = ()  # strings that end an answer
    compiled: bool = False  # compile the decoder block of a step, once: worth its seconds where there is much to write
    batch_size: PositiveInt = 64
    limit: PositiveInt | None = None
    samples: NonNegativeInt = 3  # answers to show

    def check(self, abstract: AbstractState) -> AbstractState:
        """The data is there and asks something."""
        asked_data(abstract, self.data, self.label, "instruct", "chat")
        return abstract

    @property
    def result(self) -> Result:
        """The answers, in the run folder."""
        return Result(f"run/{self.label}.jsonl", "file")

    def run(self, state: PipelineState) -> PipelineState:
        """state with a record of where the answers lie."""
        file = paths.locate(self.result.path, state.folder)
        asked = prompts(state.data[self.data], state.loaded.tokenizer, state.loaded.template)[: self.limit]
        ids = [one.ids for one in asked]
        model = state.loaded.model._replace(block_transform=wrap(state.log.say)) if self.compiled else state.loaded.model
        state_of = state.with_model(model=model)
        found = answered(state_of, self.label, ids, self.sampling, self.batch_size, self.max_new_tokens, self.stop)
        lines = [json.dumps({"messages": one.messages, "answer": answer}) for one, answer in zip(asked, found, strict=True)]
        write_atomic(file, ("\n".join(lines) + "\n").encode())
        for one, answer in list(zip(asked, found, strict=True))[: self.samples]:
            state.log.say(f"prompt  {one.messages[-1]['content']}\nanswer  {answer}")
        return state.record(self.label, {"what": f"{len(found)} answers", "path": str(file)})


class Harness(BaseStage, frozen=True, kw_only=True, tag="harness"):
    """Tasks of EleutherAI's lm-evaluation-harness (extra `eval`)."""

    tasks: tuple[str, ...]
    include: str | None = None  # a folder of task files
    n_shots: NonNegativeInt | None = None  # each task's own if absent
    chat_template: bool = False
    system: str | None = None
    batch_size: PositiveInt = 16
    limit: PositiveInt | None = None  # samples a task
    max_length: PositiveInt | None = None  # tokens; what the model was made for if absent

    def check(self, abstract: AbstractState) -> AbstractState:
        """The extra is installed and the folder of tasks is there."""
        lm_eval.check(paths.locate(self.include) if self.include else None)
        return abstract

    def run(self, state: PipelineState) -> PipelineState:
        """state with a record of every task's metrics."""
        if self.label in state.records:
            return state
        loaded = state.loaded
        params = adapted_params(state)
        results = lm_eval.evaluate(
            loaded.model,
            params,
            loaded.tokenizer,
            loaded.template,
            tasks=self.tasks,
            include=paths.locate(self.include) if self.include else None,
            n_shots=self.n_shots,
            chat_template=self.chat_template,
            system=self.system,
            batch_size=self.batch_size,
            limit=self.limit,
            max_length=self.max_length,
            stop_ids=stop_ids(loaded.tokenizer, loaded.template),
        )
        for task, found in results["tasks"].items():
            shown = "  ".join(f"{name} {one['value']:.4f}" for name, one in found["metrics"].items())
            state.log.say(f"{self.label}: {task} ({found['n_samples']} samples)  {shown}")
        return state.record(self.label, results)


def answered(
    state: PipelineState,
    label: str,
    ids: list[list[int]],
    sampling: Sampling,
    batch_size: int,
    max_new_tokens: int,
    stop: tuple[str, ...],
) -> list[str]:
    """The model's answers to prompts, in their order; state.Stopped when the run is asked to stop."""
    loaded = state.loaded
    params = adapted_params(state)
    with state.log.progress(label, len(ids), 0) as progress:

        def report(done: int) -> None:
            progress.update(done, {})
            if state.stopping():
                raise Stopped(0, state.folder)  # nothing is lost: a resumed run answers again

        return answers(
            loaded.model,
            params,
            ids,
            loaded.tokenizer,
            sampling=sampling,
            seed=state.seed,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids(loaded.tokenizer, loaded.template),
            stop_strings=stop,
            on_progress=report,
        )


def _sums(model: Model, params: Params, batch: Batch) -> Float[Tensor, "3"]:
    """Nats, how many targets were the likeliest tokens, and how many targets there are: summed over a batch."""

    def values(logits: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([cross_entropy(logits, targets), (logits.argmax(-1) == targets).float()], dim=-1)

    with torch.no_grad():
        nats_and_right = model.token_losses(params, batch, values)
        sums = nats_and_right.to(widest_float(nats_and_right.device)).sum((0, 1))
    n_targets = to_device(batch.target_mask().sum(), sums.device).to(sums.dtype)
    return torch.cat([sums, n_targets[None]])


def model_bytes(state: PipelineState) -> int:
    """Bytes of the model as it would be saved now: dense weights as stored, quantized ones as codes, deltas beside them."""
    loaded = state.loaded
    kept = {name: w for name, w in loaded.params.items() if not isinstance(w, Tensor)}
    deltas = {name: leaf for name, leaf in loaded.trainable.items() if not isinstance(leaf, Tensor)}
    return tree.n_bytes(({**loaded.stored, **kept}, deltas))
