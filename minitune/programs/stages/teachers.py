"""Teachers of a distillation: checked against the student before a run, and loaded."""

from minitune.algorithms.distillation import Teacher
from minitune.algorithms.objective import apply_trainable
from minitune.errors import InputError
from minitune.losses.registry import Loss
from minitune.programs.loading import ModelSource, abstract_state, load, say_widening
from minitune.programs.state import AbstractState, PipelineState
from minitune.text.tokenizer import Tokenizer

PROBE = "The 1st naïve Ångström — 東京, Привет, שלום 🙂\n\tif x != 10:"  # of many scripts


def check_teacher(
    label: str,
    loss: Loss,
    source: ModelSource | None,
    abstract: AbstractState,
    cached_top_k: int | None,
) -> None:
    """InputError unless a distillation, and no other loss, has a teacher of the student's tokens.

    The embeddings of the two may be padded to different sizes.
    """
    if loss.needs_teacher != (source is not None):
        has = "no teacher" if source is None else "a teacher"
        raise InputError(
            f"stages: {label} has {has}, expected one exactly with a distillation loss "
            "(forward_kl, reverse_kl, symmetric_kl, jensen_shannon)"
        )
    if source is None:
        return
    teacher = abstract_state(source, abstract)
    odd = different_token(abstract.text()[0], teacher.text()[0])
    if odd is not None:
        raise InputError(
            f"stages: {label} has a teacher ({source.path or source.config}) {odd}, expected the "
            "student's tokens under the same ids; distil from a model of the same family"
        )
    student_size = abstract.model.config.vocab_size
    teacher_size = teacher.model.config.vocab_size
    if cached_top_k is not None and teacher_size > student_size:
        raise InputError(
            f"stages: {label} has cached_top_k and a teacher of {teacher_size} tokens, expected no "
            f"more than the student's {student_size}; remove cached_top_k"
        )


def different_token(student: Tokenizer, teacher: Tokenizer) -> str | None:
    """First difference, in words, by which a teacher would read other ids than the student writes.

    None where the teacher has every token of the student's under the same id. It may know more.
    Chat templates and the spelling of the files don't matter.
    """
    if student.fingerprint == teacher.fingerprint:
        return None
    if teacher.vocab_size < student.vocab_size:
        return f"of {teacher.vocab_size} tokens, fewer than the student's {student.vocab_size}"
    for token in range(student.vocab_size):
        ours, theirs = (one.decode([token], skip_special=False) for one in (student, teacher))
        if ours != theirs:
            return f"whose token {token} is {theirs[:40]!r} and the student's {ours[:40]!r}"
    both = [one.encode(PROBE, parse_special=False) for one in (student, teacher)]
    return None if both[0] == both[1] else "that splits a text into other tokens"


def load_teacher(label: str, source: ModelSource, state: PipelineState) -> Teacher:
    """Teacher with its weights; what its own deltas change is applied."""
    teacher = load(source, state.folder, state.seed, log=state.log, sharding=state.sharding)
    odd = different_token(state.loaded.tokenizer, teacher.tokenizer)
    if odd is not None:
        raise InputError(
            f"stages: {label} has a teacher ({teacher.tokenizer_folder}) {odd}, expected the "
            "student's tokens under the same ids; distil from a model of the same family"
        )
    say_widening(state.log, f"{label}: teacher", teacher.params)
    params = apply_trainable(teacher.params, teacher.trainable, teacher.lora)
    return Teacher(teacher.model, params)
