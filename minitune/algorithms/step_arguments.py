"""Arguments of a step, checked before anything is computed: each message says what was expected."""

from minitune import tree
from minitune.errors import quoted
from minitune.types import Batch, Pairs, SeededBatch, TeacherBatch, UnpairedBatch

BATCHES = Batch, Pairs, UnpairedBatch, TeacherBatch, SeededBatch


def require_parts(objective: object, optimizer: object, micro_batch: object) -> None:
    """TypeError for what is no objective, no optimizer, or no number of rows."""
    require_micro_batch(micro_batch)
    if not callable(objective):
        raise TypeError(
            f"steps: the objective is a {type(objective).__name__}, expected a function "
            "(trainable, params, batch) -> (Mean, reports), such as sft(model, lora)"
        )
    is_class = isinstance(optimizer, type)
    found = f"the class {optimizer.__name__}" if is_class else f"a {type(optimizer).__name__}"
    missing = [name for name in ("init", "update") if not hasattr(optimizer, name)]
    if is_class or missing:
        without = f" without {' and '.join(missing)}" if missing else ""
        raise TypeError(
            f"steps: the optimizer is {found}{without}, expected an instance with init(params) -> "
            "state and update(grads, state, params) -> (updates, state), such as optim.AdamW(lr)"
        )


def require_micro_batch(n_rows: object) -> None:
    """TypeError for what is no number of rows."""
    if n_rows is None or (isinstance(n_rows, int) and n_rows > 0 and n_rows is not True):
        return
    raise TypeError(
        f"steps: micro_batch is {quoted(n_rows)}, expected an integer of at least 1, or None for "
        "all rows of the batch"
    )


def require_batch(batch: object) -> None:
    """TypeError for what is no batch of rows, or whose tensors have different numbers of them."""
    kind = type(batch).__name__
    if not isinstance(getattr(batch, "counts", None), str):
        state = "without" if not hasattr(batch, "counts") else "whose `counts` is no string, not"
        raise TypeError(
            f"steps: the batch is a {kind} {state} the property `counts`, expected one of "
            f"{', '.join(one.__name__ for one in BATCHES)} or a NamedTuple of tensors with it: the "
            'name in metrics of what its rows are counted in, such as "target_tokens"'
        )
    try:
        n_rows = {path: len(leaf) if leaf.ndim else 0 for path, leaf in tree.items(batch)}
    except TypeError as error:
        raise TypeError(
            f"steps: the batch is a {kind} that is no tree of tensors, expected a NamedTuple of "
            f"tensors or of such NamedTuples ({error})"
        ) from None
    if not n_rows or len(set(n_rows.values())) > 1 or not max(n_rows.values()):
        found = ", ".join(f"{path} {n}" for path, n in n_rows.items()) or "no tensor"
        raise TypeError(
            f"steps: the batch has rows: {found}; expected the same number, at least 1, in all; "
            f"cut or pad its {len(n_rows)} tensors"
        )
