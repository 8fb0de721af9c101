"""Comparison of what was written with minitune: an independent reader opens it, and its logits and
greedy text are held against ours.
"""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import torch
from jaxtyping import Float
from torch import Tensor

from minitune.inference.generate import greedy
from minitune.interop.readers.reader import Reader
from minitune.models.model import Model
from minitune.types import Params


class OurModel(NamedTuple):
    """Model that an artefact is held against, with float32 weights on the CPU."""

    model: Model
    params: Params
    name: str  # the folder that it was read from


class Agreement(msgspec.Struct, frozen=True):
    """Logits and greedy text of a reader beside ours."""

    # largest difference of a logit, as a share of the largest logit
    logits_error: float
    top1_agreement: float  # share of tokens after which both find the same next one likeliest
    n_tokens: int  # that were compared so
    greedy_equal: int  # tokens of greedy answers that are equal, up to the first that is not
    greedy_tokens: int  # of all answers together
    # largest lead of our token over theirs where answers first differ, as a share of the largest
    # logit
    greedy_margin: float


class Figures(msgspec.Struct, frozen=True):
    """Agreement of an artefact with minitune, as verify.json holds it."""

    artefact: str  # its path
    format: str
    reader: str  # packages that opened it, with their versions
    against: str  # what it was compared with
    minitune: str  # version
    # largest logits_error that the format allows: that of float32 sums in another order, or of its
    # rounding
    bound: float
    agreement: Agreement

    @property
    def agrees(self) -> bool:
        """True if the logits differ by no more than the bound, and answers only where two tokens
        are as near as that.
        """
        measured = self.agreement
        return measured.logits_error <= self.bound and measured.greedy_margin <= 2 * self.bound

    def lines(self) -> list[str]:
        """Figures for the terminal."""
        measured = self.agreement
        return [
            f"{self.artefact}: {self.format}, opened by {self.reader}, against {self.against}",
            f"logits: largest error {measured.logits_error:.2e}, bound {self.bound:.0e}",
            f"likeliest next token: the same after {measured.top1_agreement:.1%} of "
            f"{measured.n_tokens} tokens",
            f"greedy text: {measured.greedy_equal} of {measured.greedy_tokens} tokens equal",
        ]


class _OnPrompt(NamedTuple):
    """Agreement on one prompt."""

    error: Tensor  # largest difference of a logit
    peak: Tensor  # largest logit of ours
    same: Tensor  # [T], True where the likeliest tokens are equal
    n_equal: int
    n_new: int
    margin: float


def our_answers(
    subject: OurModel, prompts: Sequence[Sequence[int]], n_new: int
) -> tuple[list[list[int]], list[Float[Tensor, "T V"]]]:
    """(greedy answers of n_new tokens, logits of every prompt with its answer)."""
    model, params = subject.model, subject.params
    answers = greedy(model, params, prompts, max_new_tokens=n_new, stop_ids=[])
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    with torch.no_grad():
        return answers, [model.forward(params, torch.tensor([text]))[0] for text in texts]


def agreement(
    reader: Reader,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    logits: Sequence[Float[Tensor, "T V"]],
) -> Agreement:
    """Logits and greedy text of a reader beside ours; answers and logits are `our_answers`."""
    rows = zip(prompts, answers, logits, strict=True)
    each = [_on_prompt(reader, prompt, answer, ours) for prompt, answer, ours in rows]
    same = torch.cat([one.same for one in each])
    return Agreement(
        logits_error=max(float(one.error / one.peak) for one in each),
        top1_agreement=float(same.float().mean()),
        n_tokens=len(same),
        greedy_equal=sum(one.n_equal for one in each),
        greedy_tokens=sum(one.n_new for one in each),
        greedy_margin=max(one.margin for one in each),
    )


def _on_prompt(
    reader: Reader, prompt: Sequence[int], answer: Sequence[int], ours: Float[Tensor, "T V"]
) -> _OnPrompt:
    theirs = reader.logits([*prompt, *answer])[:, : ours.shape[1]]
    new = reader.greedy(prompt, len(answer))
    differs = [one != other for one, other in zip(answer, new, strict=True)]
    n_equal = differs.index(True) if any(differs) else len(answer)
    peak = ours.abs().max()
    margin = 0.0
    if n_equal < len(answer):
        at = ours[len(prompt) + n_equal - 1]
        margin = float((at[answer[n_equal]] - at[new[n_equal]]) / peak)
    same = theirs.argmax(-1) == ours.argmax(-1)
    return _OnPrompt((theirs - ours).abs().max(), peak, same, n_equal, len(answer), margin)
