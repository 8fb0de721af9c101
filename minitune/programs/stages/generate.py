"""Stage that answers prompts, and the answers of a model to many prompts at once."""

import json
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from minitune.checkpoint.tensors import require_finite
from minitune.data.encoded_rows import Refused
from minitune.data.prompts import Prompt, questions
from minitune.errors import InputError
from minitune.inference.generate import answers
from minitune.inference.sampling import Sampling
from minitune.io import paths
from minitune.io.atomic import write_atomic
from minitune.io.results import Result
from minitune.models.compile import wrap
from minitune.programs.data_tables import require_data
from minitune.programs.report import clipped
from minitune.programs.stages.base import BaseStage, adapted_params
from minitune.programs.state import AbstractState, PipelineState
from minitune.text.chat import encode_prompt
from minitune.text.template import Message
from minitune.types import NonNegativeInt, PositiveInt


class Answer(NamedTuple):
    """Text that a model wrote; is_cut: max_new_tokens ended it, and not the model."""

    text: str
    is_cut: bool

    @property
    def shown(self) -> str:
        """Text as a person sees it, marked where it was cut."""
        return f"{self.text} (cut)" if self.is_cut else self.text


class Generate(BaseStage, frozen=True, kw_only=True, tag="generate"):
    """Answer the prompts of a data file, or one prompt, and write {"messages", "answer"} lines to
    NAME.jsonl in the run folder, NAME being the stage's."""

    observes: ClassVar[bool] = True
    gathers: ClassVar[bool] = True
    shards: ClassVar[bool] = True
    free_keys: ClassVar[tuple[str, ...]] = ("batch_size", "compiled", "samples")

    data: str | None = None  # name of the [data] table whose prompts are answered
    prompt: str | None = None  # one message of the user, in place of data
    sampling: Sampling = Sampling()  # how a token is drawn; the likeliest if absent
    max_new_tokens: PositiveInt = 256  # tokens of an answer at most
    stop: tuple[str, ...] = ()  # strings that end an answer
    # compile the decoder block of a step, once: worth its seconds where there is much to write
    compiled: bool = False
    # prompts at once; as many tokens as a training step takes if absent
    batch_size: PositiveInt | None = None
    limit: PositiveInt | None = None  # prompts to answer; all if absent
    samples: NonNegativeInt = 3  # answers to show

    def check(self, abstract: AbstractState) -> AbstractState:
        """InputError unless there is a prompt, or data that asks something."""
        if (self.data is None) == (self.prompt is None):
            has = "both data and prompt" if self.data else "neither data nor prompt"
            raise InputError(f"stages: {self.label} has {has}, expected one; write or remove one")
        if self.data is not None:
            require_data(abstract, self.data, self.label, "instruct", "chat")
        return abstract

    def prepare(self, abstract: AbstractState) -> list[str]:
        """Notes on the prompts; InputError for a row that asks nothing."""
        if self.data is None:
            return [f"the prompt is {self.prompt!r}"]
        refused: list[Refused] = []
        asked = questions(abstract.data[self.data], *abstract.text(), self.limit, refused)
        skipped = f", {len(refused):,} rows refused and skipped" if refused else ""
        return [f"{self.data} has {len(asked):,} prompts{skipped}"]

    @property
    def result(self) -> Result:
        """Answers, in the run folder."""
        return Result(f"run/{self.label}.jsonl", "file")

    def run(self, state: PipelineState) -> PipelineState:
        """State with a record of where the answers lie."""
        file = paths.locate(self.result.path, state.folder)
        if self.compiled:
            compiled = state.loaded.model._replace(block_transform=wrap(state.log.say))
            answering = state.with_model(model=compiled)
        else:
            answering = state
        asked = self._questions(state)
        ids = [prompt.ids for prompt in asked]
        limits = self.batch_size, self.max_new_tokens
        replies = answered(answering, self.label, ids, self.sampling, *limits, self.stop)
        pairs = list(zip(asked, replies, strict=True))
        rows = [{"messages": prompt.messages, "answer": reply.text} for prompt, reply in pairs]
        lines = [json.dumps(row) for row in rows]
        if state.ranks.is_first:
            write_atomic(file, ("\n".join(lines) + "\n").encode())
        for prompt, reply in pairs[: self.samples]:
            asking = conversation_text(prompt.messages)
            state.log.say(f"prompt  {clipped(asking)}\nanswer  {clipped(reply.shown)}")
        record = {"what": f"{len(replies)} answers", "path": str(file)}
        return state.record(self.label, record)

    def _questions(self, state: PipelineState) -> list[Prompt]:
        loaded = state.loaded
        text = loaded.tokenizer, loaded.template
        if self.data is not None:
            return questions(state.data[self.data], *text, self.limit)
        message = {"role": "user", "content": str(self.prompt)}
        return [Prompt(encode_prompt(*text, [message]), "", [], [message])]


def conversation_text(messages: Sequence[Message]) -> str:
    """Messages as a person reads them: the only one as it is, several with their roles."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message.get('content')}" for message in messages)


def answered(
    state: PipelineState,
    label: str,
    ids: list[list[int]],
    sampling: Sampling,
    batch_size: int | None,
    max_new_tokens: int,
    stop: tuple[str, ...],
) -> list[Answer]:
    """Answers of the model to prompts, in their order.

    batch_size None: so many prompts at once that their tokens are not more than a training step's.
    """
    loaded = state.loaded
    params = adapted_params(state)
    require_finite(params, f"stages: {label}")
    n_rows = batch_size or state.rows_at_once(max(map(len, ids), default=1) + max_new_tokens)
    cut: set[int] = set()
    with state.log.progress(label, len(ids), brief=True) as progress:

        def report(done: int) -> None:
            progress.update(done, {})

        texts = answers(
            loaded.model,
            params,
            ids,
            loaded.tokenizer,
            sampling=sampling,
            seed=state.seed,
            batch_size=n_rows,
            max_new_tokens=max_new_tokens,
            stop_ids=loaded.stop_ids,
            stop_strings=stop,
            on_progress=report,
            on_cut=cut.add,
        )
    return [Answer(text, is_cut=i in cut) for i, text in enumerate(texts)]
