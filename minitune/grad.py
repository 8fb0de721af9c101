"""Gradients of pure functions over trees, with the memory of plain autograd.

`torch.func.grad` keeps a graph of the gradient (create_graph=True), which costs about twice the memory of
`torch.autograd.grad` and is slower. Here the same contract is kept with fresh detached leaves; inside a functorch
transform, where detached leaves can't be made, the torch.func form is used and stays right.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitune import tree
from minitune.hardware import is_accelerator
from minitune.tree import Tree


def under_transform() -> bool:
    """Whether a functorch transform (vmap, grad, jvp, ...) is being traced here."""
    # not peek_interpreter_stack(): while torch.compile traces, that always finds one
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0  # pyright: ignore[reportAttributeAccessIssue]


def value_and_grad(fn: Callable[..., Any], has_aux: bool = False) -> Callable[..., tuple[Any, Tree]]:
    """Turn `fn: (tree, *rest) -> Mean` into `(tree, *rest) -> (Mean, gradient of its total by the tree)`.

    With has_aux, fn returns (Mean, aux). This is the contract of torch.func.grad_and_value, value first: no argument is
    written, no `.grad` is set, and a leaf that fn does not use gets a zero gradient. The result carries no graph. TypeError
    names a leaf that is not floating point.
    """

    def evaluate(params: Tree, *rest: Any) -> tuple[Any, Tree]:
        for path, leaf in tree.items(params):
            if not leaf.is_floating_point():
                raise TypeError(f"grad: {path or 'root'} is {leaf.dtype}, expected a floating-point tensor")
        if under_transform():
            return _transformed(fn, has_aux, params, rest)
        own = detached_leaves(params)
        with torch.enable_grad():
            value = fn(own, *rest)
        total = (value[0] if has_aux else value).total
        grads = _autograd([total], tree.leaves(own), [torch.ones_like(total)])
        return tree.map(Tensor.detach, value), tree.rebuild(params, grads)

    return evaluate


def detached_leaves(params: Tree) -> Tree:
    """Copies of the leaves that share memory with them and that autograd differentiates by."""
    return tree.map(lambda x: x.detach().requires_grad_(), params)


def per_example(fn: Callable[[Tree, Any], Any], *, chunk: int) -> Callable[[Tree, Any], tuple[Any, Tree]]:
    """Turn `fn: (tree, example) -> Mean` into `(tree, examples) -> (Mean [B], gradients [B, ...] of each example's total)`.

    An example is what the leaves of `examples` hold at one place of their first dimension. Each of the `chunk` that a vmap takes
    has a view of the tree for leaves of its own, which keeps their gradients apart; memory grows by the activations of `chunk`
    examples and by what is returned. TypeError names a leaf that is not floating point.
    """

    def evaluate(params: Tree, examples: Tree) -> tuple[Any, Tree]:
        def some(rows: Tree) -> tuple[Any, Tree]:
            def summed(own: Tree) -> tuple[Any, Any]:
                each = torch.func.vmap(fn)(own, rows)
                return type(each)(*(x.sum() for x in each)), each

            n = len(tree.leaves(rows)[0])
            own = tree.map(lambda x: x.expand(n, *x.shape), params)
            (_, each), grads = value_and_grad(summed, has_aux=True)(own)
            return each, grads

        starts = range(0, len(tree.leaves(examples)[0]), chunk)
        parts = [some(tree.map(lambda x, i=i: x[i : i + chunk], examples)) for i in starts]
        return tree.map(lambda *x: torch.cat(x), *parts)

    return evaluate


def accumulate(evaluate: Callable[[Any], Tree], micro_batches: Iterable[Any]) -> Tree:
    """Sum evaluate(micro_batch) leafwise: totals, weights and gradients add, and whoever calls divides once.

    Peak memory does not grow with the number of micro-batches: each pair of leaves is freed as its sum is made.
    TypeError if there is no micro-batch.
    """
    structure: Tree = None
    sums: list[Tensor] = []
    for micro_batch in micro_batches:
        value = evaluate(micro_batch)
        structure, parts = tree.map(lambda _: _HOLE, value), tree.leaves(value)[::-1]
        del value
        sums = [torch.add(sums.pop(), parts.pop()) for _ in range(len(sums))][::-1] if sums else parts
    if structure is None:
        raise TypeError("grad: no micro-batch to accumulate, expected at least one")
    return tree.rebuild(structure, sums[::-1])


_HOLE = torch.empty(0)  # stands where a leaf was, so that a kept structure keeps no leaf alive


def remat(f: Callable[..., Any]) -> Callable[..., Any]:
    """f, but its backward recomputes f from its inputs: nothing inside f is kept (Chen et al. 2016, arXiv 1604.06174).

    Arguments are trees of tensors and the result is one tensor. What f closes over gets no gradient, so whatever
    is to be differentiated must be an argument. Works under plain autograd, vmap and torch.func.grad.
    """

    def recomputed(*args: Tree) -> Tensor:
        flat, tensors = flattened(f, args)
        return _Remat.apply(flat, *tensors)

    return recomputed


def flattened(f: Callable[..., Tensor], args: Tree) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """(f as a function of the leaves of its arguments, these leaves); the function keeps none of them alive."""
    structure = tree.map(lambda _: _HOLE, args)
    return lambda *tensors: f(*tree.rebuild(structure, tensors)), tree.leaves(args)


def kept_bytes(f: Callable[..., Tensor], x: Tensor, *rest: Tree) -> int:
    """Bytes that f(x, *rest), differentiated in x, keeps for its backward beside x and the leaves of rest; each memory once."""
    held = {_memory(leaf) for leaf in tree.leaves((x, rest))}
    kept: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        if _memory(saved) not in held:
            kept[_memory(saved)] = saved.untyped_storage().nbytes()
        return saved

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        value = f(x.detach().requires_grad_(), *rest)
    del value  # only now: what it holds was not to be used again before all was counted
    return sum(kept.values())


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata  # and not its address, which tensors without values do not have


class _Remat(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(f: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return f(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.f = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        return None, *pullback(ctx.f, ctx.saved_tensors, grad_outputs[0], ctx.needs_input_grad[1:])


def with_derivative(f: Callable[..., Tensor], derivative: Callable[..., Sequence[Tensor | None]]) -> Callable[..., Tensor]:
    """f of tensors alone, whose backward is derivative(cotangent, needed, *tensors): nothing inside f is kept.

    derivative returns the vector-Jacobian product of every tensor, None where `needed` has False. It must not be what is
    differentiated itself: for a gradient of the gradient f is computed once more, by autograd.
    """
    return lambda *tensors: _WithDerivative.apply(f, derivative, *tensors)


class _WithDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Callable[..., Tensor], derivative: Callable[..., Any], *tensors: Tensor) -> Tensor:
        ctx.f, ctx.derivative = f, derivative
        ctx.save_for_backward(*tensors)
        return f(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # somebody differentiates the gradient
            return None, None, *pullback(ctx.f, ctx.saved_tensors, grad_outputs[0], needed)
        return None, None, *ctx.derivative(grad_outputs[0], needed, *ctx.saved_tensors)


def with_row_gradients(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """f(rows [n ...], *args) -> values [n ...], whose gradient by rows is taken in the forward, while what f makes is there.

    For an f whose values of a row depend on that row alone, and whose other arguments need no gradient. Differentiable once.
    """

    def evaluate(rows: Tensor, *args: Tree) -> Tensor:
        return _RowGradients.apply(lambda x: f(x, *args), rows)

    return evaluate


class _RowGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        fresh = rows.detach().requires_grad_()
        with torch.enable_grad():
            found = values(fresh)
            columns = (found.unsqueeze(-1) if found.ndim == 1 else found.flatten(1)).sum(0).unbind()
        grads = [torch.autograd.grad(x, fresh, retain_graph=i + 1 < len(columns))[0] for i, x in enumerate(columns)]
        ctx.save_for_backward(*grads)
        return found.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # a sum's cotangent spares a pass over what is large; an accelerator would be waited for to see it
        if len(ctx.saved_tensors) == 1 and not is_accelerator(grad_outputs[0].device) and bool((grad_outputs[0] == 1).all()):
            return None, ctx.saved_tensors[0]
        cotangents = grad_outputs[0].unsqueeze(-1) if grad_outputs[0].ndim == 1 else grad_outputs[0].flatten(1)
        parts = (c[:, None] * g for c, g in zip(cotangents.unbind(1), ctx.saved_tensors, strict=True))
        return None, reduce(torch.add, parts).to(ctx.saved_tensors[0].dtype)


def in_chunks(f: Callable[..., Tensor], rows: Tensor, weights: Tree, chunk: int, summed: bool = False) -> Tensor:
    """f(start, rows[start : start + chunk], weights) -> one value a row, for all chunks together, with the gradients of rows and
    weights taken in the forward: right if the values are then summed, which is when they all have one cotangent.

    On a CPU, every chunk is computed again if the cotangents turn out to differ. An accelerator would be waited for to see
    them, so there the caller says what they are: with `summed` they are 1, and the gradients are NaN if they are not;
    without it every chunk is computed again. What f closes over gets no gradient. Differentiable once.
    """
    structure = tree.map(lambda _: _HOLE, weights)

    def of_leaves(start: int, x: Tensor, *leaves: Tensor) -> Tensor:
        return f(start, x, tree.rebuild(structure, leaves))

    return _InChunks.apply(of_leaves, chunk, summed, rows, *tree.leaves(weights))


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Callable[..., Tensor], chunk: int, summed: bool, *tensors: Tensor) -> Tensor:
        ctx.f, ctx.chunk, ctx.summed = f, chunk, summed
        if is_accelerator(tensors[0].device) and not summed:
            ctx.save_for_backward(*tensors)
            starts = range(0, max(len(tensors[0]), 1), chunk)
            return torch.cat([f(i, tensors[0][i : i + chunk], *tensors[1:]) for i in starts])
        values, grads = _chunk_gradients(f, chunk, tensors, ctx.needs_input_grad[3:], lambda x, start: torch.ones_like(x))
        ctx.save_for_backward(*tensors, *grads)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needed, cotangent = ctx.needs_input_grad[3:], grad_outputs[0]
        tensors, grads = ctx.saved_tensors[: len(needed)], ctx.saved_tensors[len(needed) :]
        accelerated = is_accelerator(cotangent.device)
        one = cotangent.flatten()[:1].sum()  # of no row too
        if accelerated and ctx.summed:
            fault = torch.where((cotangent == 1).all(), 0.0, torch.nan)
            firsts = [g.view(-1)[:1] for g in grads if g.numel() > 0]
            tree.donate_sum(firsts, [fault.to(x.dtype)[None] for x in firsts])
        elif not accelerated and bool((cotangent == one).all()):
            grads = grads if bool(one == 1) else [g * one.to(g.dtype) for g in grads]  # a copy is as large as the head
        else:
            grads = _chunk_gradients(ctx.f, ctx.chunk, tensors, needed, lambda x, i: cotangent[i : i + len(x)])[1]
        given = iter(grads)
        return None, None, None, *(next(given) if need else None for need in needed)


def _chunk_gradients(
    f: Callable[..., Tensor],
    chunk: int,
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    cotangent: Callable[[Tensor, int], Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """(the values of all chunks, the gradients of the tensors that need one); the first tensor is cut in chunks, and what the
    chunks say of the others is added up in float32 or wider."""
    rows, *weights = tensors
    chosen = [w for w, need in zip(weights, needed[1:], strict=True) if need]
    sums = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in chosen]
    values, pieces = [], []
    for start in range(0, max(len(rows), 1), chunk):  # no row at all still makes one empty piece
        fresh = [x.detach().requires_grad_(need) for x, need in zip((rows[start : start + chunk], *weights), needed, strict=True)]
        with torch.enable_grad():
            found = f(start, *fresh)
        grads = list(_autograd([found], [x for x in fresh if x.requires_grad], [cotangent(found, start)]))
        values.append(found.detach())
        pieces += [grads.pop(0)] if needed[0] else []
        tree.donate_sum(sums, grads)
        del grads  # as large as the weights, and not to be there beside those of the next chunk
    joined = [torch.cat(pieces)] if needed[0] else []
    return torch.cat(values), [*joined, *(x.to(w.dtype) for x, w in zip(sums, chosen, strict=True))]


def pullback(
    f: Callable[..., Tensor], tensors: Sequence[Tensor], cotangent: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Vector-Jacobian product of f for the inputs that need one, None for the others."""
    if under_transform() or torch.is_grad_enabled():  # grad mode is on here when somebody differentiates the gradient

        def active(*some: Tensor) -> Tensor:
            given = iter(some)
            return f(*(next(given) if need else x for x, need in zip(tensors, needed, strict=True)))

        vjp = torch.func.vjp(active, *(x for x, need in zip(tensors, needed, strict=True) if need))[1]
        grads = vjp(cotangent, retain_graph=torch.is_grad_enabled(), create_graph=torch.is_grad_enabled())
    else:
        fresh = [x.detach().requires_grad_(need) for x, need in zip(tensors, needed, strict=True)]
        with torch.enable_grad():
            value = f(*fresh)
        grads = _autograd([value], [x for x in fresh if x.requires_grad], [cotangent])
    given = iter(grads)
    return [next(given) if need else None for need in needed]


def _autograd(values: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor]) -> Sequence[Tensor]:
    if not any(value.requires_grad for value in values):  # fn used no leaf at all
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(values, inputs, cotangents, allow_unused=True, materialize_grads=True)


def _transformed(fn: Callable[..., Any], has_aux: bool, params: Tree, rest: Sequence[Any]) -> tuple[Any, Tree]:
    def total(fresh: Tree) -> tuple[Tensor, Any]:
        value = fn(fresh, *rest)
        return (value[0] if has_aux else value).total, value

    grads, (_, value) = torch.func.grad_and_value(total, has_aux=True)(params)
    return value, grads
