"""Gradients of pure functions over trees, with the memory of plain autograd.

`torch.func.grad` keeps a graph of the gradient (create_graph=True), which costs about twice the
memory of `torch.autograd.grad` and is slower. Here the same contract is kept with fresh detached
leaves; inside a functorch transform, where detached leaves can't be made, the torch.func form is
used and stays right.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from minitune import tree
from minitune.tree import Tree
from minitune.types import wide_dtype

FUNCTORCH: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def under_transform() -> bool:
    """True while a functorch transform (vmap, grad, ...) is being traced, and in forward mode."""
    # not peek_interpreter_stack(): while torch.compile traces, that always finds one
    return FUNCTORCH.get_dynamic_layer_stack_depth() > 0 or in_forward_mode()


def in_forward_mode() -> bool:
    """True inside torch.func.jvp, jacfwd or linearize, and inside forward_ad.dual_level.

    Only the first two show in functorch's stack. An operator without a rule drops the tangents of
    its inputs without a word: in forward mode functions here are made of torch's own operators.
    """
    return forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]


def takes_gradients() -> bool:
    """True inside torch.func.grad, vjp or one of their kin; of any transform that is compiled."""
    if torch.compiler.is_compiling():  # which can't look at the stack
        return FUNCTORCH.get_dynamic_layer_stack_depth() > 0
    stack = FUNCTORCH.get_interpreter_stack() or ()
    return any(level.key() == FUNCTORCH.TransformType.Grad for level in stack)


def value_and_grad(
    fn: Callable[..., Any], has_aux: bool = False
) -> Callable[..., tuple[Any, Tree]]:
    """Turn `fn: (tree, *rest) -> Mean` into `(tree, *rest) -> (Mean, gradient of its total by the
    tree)`.

    With has_aux, fn returns (Mean, aux). This is the contract of torch.func.grad_and_value, value
    first: no argument is written, no `.grad` is set, and a leaf that fn does not use gets a zero
    gradient. The result carries no graph. TypeError names a leaf that is not floating point, and
    says what fn returned if that is no Mean; RuntimeError inside torch.inference_mode.
    """

    # of a function within a function, torch.compile can't follow an annotation like tuple[...]
    def evaluate(params: Tree, *rest: Any) -> Tree:
        for path, leaf in tree.items(params):
            if not leaf.is_floating_point():
                raise TypeError(
                    f"grad: {path or 'root'} is {leaf.dtype}, expected a floating-point tensor"
                )
        # torch.compile can follow torch.func, but not detached leaves
        if under_transform() or torch.compiler.is_compiling():
            return _transformed(fn, has_aux, params, rest)
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "grad: torch.inference_mode is on, which records nothing; take gradients outside "
                "of it",
            )
        leaves = detached_leaves(params)
        with torch.enable_grad():
            value = fn(leaves, *rest)
        total = total_of(value, has_aux)
        # a sweep has a total for each of its adapters
        ones = [torch.ones_like(total)] if total.ndim else None
        grads = autograd_grads([total], tree.leaves(leaves), ones)
        return tree.map(Tensor.detach, value), tree.rebuild(params, grads)

    return evaluate


def detached_leaves(params: Tree) -> Tree:
    """Copies of the leaves that share memory with them and that autograd differentiates by."""
    return tree.map(lambda x: x.detach().requires_grad_(), params)


def detached_where(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    """Tensors outside of any graph, of which the needed ones begin a new graph."""
    return [x.detach().requires_grad_(need) for x, need in zip(tensors, needed, strict=True)]


def per_example(
    fn: Callable[[Tree, Any], Any], *, chunk: int
) -> Callable[[Tree, Any], tuple[Any, Tree]]:
    """Turn `fn: (tree, example) -> Mean` into `(tree, examples) -> (Mean [B], gradients [B, ...] of
    each example's total)`.

    An example is what the leaves of `examples` hold at one place of their first dimension. Each of
    the `chunk` that a vmap takes has a view of the tree for its leaves, which keeps their gradients
    apart; memory grows by the activations of `chunk` examples and by what is returned. TypeError
    names a leaf that is not floating point, and says what fn returned if that is no Mean.
    """

    def of_one(params: Tree, example: Tree) -> Any:
        value = fn(params, example)
        require_scalars(value, total_of(value, has_aux=False))
        return value

    def evaluate(params: Tree, examples: Tree) -> Tree:
        def some(rows: Tree) -> Tree:
            def summed(copies: Tree) -> Tree:
                means = torch.func.vmap(of_one)(copies, rows)
                return type(means)(*(x.sum() for x in means)), means

            n = len(tree.leaves(rows)[0])
            copies = tree.map(lambda x: x.expand(n, *x.shape), params)  # views of one memory
            (_, means), grads = value_and_grad(summed, has_aux=True)(copies)
            return means, grads

        starts = range(0, len(tree.leaves(examples)[0]), chunk)
        parts = [some(tree.map(lambda x, i=i: x[i : i + chunk], examples)) for i in starts]
        return tree.map(lambda *x: torch.cat(x), *parts)

    return evaluate


def accumulate(evaluate: Callable[[Any], Tree], micro_batches: Iterable[Any]) -> Tree:
    """Sum evaluate(micro_batch) leafwise: totals, weights and gradients add, and whoever calls
    divides once.

    Sums of several are float32 or wider, whatever their dtype; the value of one is as it is.
    Peak memory does not grow with the number of micro-batches: each pair of leaves is freed as its
    sum is made. TypeError if there is no micro-batch.
    """
    structure: Tree = None
    sums: list[Tensor] = []
    for micro_batch in micro_batches:
        value = evaluate(micro_batch)
        structure, parts = tree.map(lambda _: PLACEHOLDER, value), tree.leaves(value)[::-1]
        del value
        if sums:
            parts = [_wide_sum(sums.pop(), parts.pop()) for _ in range(len(sums))][::-1]
        sums = parts
    if structure is None:
        raise TypeError("grad: no micro-batch to accumulate, expected at least one")
    return tree.rebuild(structure, sums[::-1])


def _wide_sum(x: Tensor, y: Tensor) -> Tensor:
    """x + y in float32 or wider; integers and booleans as they are."""
    return x + y.to(wide_dtype(x.dtype)) if x.is_floating_point() else x + y


# stands where a leaf was, so that a kept structure keeps no leaf alive
PLACEHOLDER = torch.empty(0)


def pullback(
    f: Callable[..., Tensor], tensors: Sequence[Tensor], cotangent: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Vector-Jacobian product of f for the inputs that need one, None for the others."""
    # grad mode is on here when somebody differentiates the gradient
    if under_transform() or torch.is_grad_enabled():

        def active(*some: Tensor) -> Tensor:
            given = iter(some)
            return f(*(next(given) if need else x for x, need in zip(tensors, needed, strict=True)))

        vjp = torch.func.vjp(active, *(x for x, need in zip(tensors, needed, strict=True) if need))[
            1
        ]
        grads = vjp(
            cotangent, retain_graph=torch.is_grad_enabled(), create_graph=torch.is_grad_enabled()
        )
    else:
        fresh = detached_where(tensors, needed)
        with torch.enable_grad():
            value = f(*fresh)
        grads = autograd_grads([value], [x for x in fresh if x.requires_grad], [cotangent])
    given = iter(grads)
    return [next(given) if need else None for need in needed]


class ClosedOverError(TypeError):
    """Raised where a tensor requires grad and is no argument of the function that depends on it."""

    def __init__(self) -> None:
        super().__init__(
            "grad: a function depends on a tensor that requires grad, "
            "expected it among its arguments; else it would get no gradient"
        )


def value_of_arguments(f: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Value f(*tensors), no graph; ClosedOverError if anything else in it requires grad."""
    with torch.enable_grad():  # nothing is recorded unless something else requires grad
        value = f(*(x.detach() for x in tensors))
    unwrapped = value
    while FUNCTORCH.is_functorch_wrapped_tensor(unwrapped):
        unwrapped = FUNCTORCH.get_unwrapped(unwrapped)
    if unwrapped.requires_grad:
        raise ClosedOverError
    return value


def refuse_other_leaves(value: Tensor, inputs: Sequence[Tensor]) -> None:
    """ClosedOverError if the graph of a value begins at any other leaf than these inputs."""
    known = {id(x) for x in inputs}
    pending = [value.grad_fn]
    visited = set()
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        leaf = getattr(node, "variable", None)  # of the nodes at which a graph begins
        if leaf is not None and id(leaf) not in known:
            raise ClosedOverError
        pending.extend(following for following, _ in node.next_functions)


def autograd_grads(
    values: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor] | None = None
) -> Sequence[Tensor]:
    """Gradients of the inputs as autograd takes them, and zeros for an input that no value depends
    on. Without cotangents the values are scalars: torch imports sympy for a cotangent that is a
    tensor, which takes half a second.
    """
    if not any(value.requires_grad for value in values):  # fn used no leaf at all
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(
        values, inputs, cotangents, allow_unused=True, materialize_grads=True
    )


def total_of(value: Any, has_aux: bool) -> Tensor:
    """Total of a function's result, which is differentiated; TypeError for another result."""
    is_pair = type(value) is tuple and len(value) == 2  # a Mean alone is a tuple of its own kind
    total = getattr(value[0] if has_aux and is_pair else value, "total", None)
    if isinstance(total, Tensor) and is_pair == has_aux:
        return total
    found = type(value).__name__
    if is_pair:
        found = f"({type(value[0]).__name__}, {type(value[1]).__name__})"
    expected = "(Mean, aux), as has_aux says" if has_aux else "a Mean, or has_aux=True beside it"
    raise TypeError(
        f"grad: the function returned {found}, expected {expected}; Mean.of(values, mask) makes one"
    )


def require_scalars(mean: Any, total: Tensor) -> None:
    """TypeError for a Mean whose total or weight is no tensor without dimensions."""
    for name, x in (("total", total), ("weight", mean.weight)):
        if isinstance(x, Tensor) and x.ndim == 0:
            continue
        found = list(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise TypeError(
            f"grad: the function returned a Mean whose {name} is {found}, expected a tensor []; "
            "Mean.of(values, mask) makes one"
        )


def _transformed(
    fn: Callable[..., Any], has_aux: bool, params: Tree, rest: Sequence[Any]
) -> tuple[Any, Tree]:
    def total(fresh: Tree) -> Any:
        value = fn(fresh, *rest)
        return total_of(value, has_aux), value

    grads, (_, value) = torch.func.grad_and_value(total, has_aux=True)(params)
    return value, grads
