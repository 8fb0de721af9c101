"""Kinds of work that operators and kernels do, by their names."""

import re
from collections.abc import Mapping
from types import MappingProxyType

MATRIX_PRODUCTS = "matrix products"
ATTENTION = "attention"
ELEMENTWISE = "norms and elementwise"
HEAD = "head and loss"
OPTIMIZER = "optimizer"
COPIES = "copies, casts and indexing"
COMMUNICATION = "communication"
QUANTIZATION = "quantization"
DATA = "waiting for data"
EVALUATION = "evaluation and saving"
BETWEEN = "Python between operators"
IDLE = "idle, waiting for the host"
OTHER = "everything else"

STEPS = "recorded steps"  # range around all that a profile is about
EVALUATING, SAVING, STEP = "evaluation", "saving", "step"
# ranges of hardware.profiled -> the kind of all that happens in one
RANGES: Mapping[str, str] = MappingProxyType(
    {
        "attention": ATTENTION,
        "head and loss": HEAD,
        "optimizer": OPTIMIZER,
        "quantization": QUANTIZATION,
        DATA: DATA,
        EVALUATING: EVALUATION,
        SAVING: EVALUATION,
    }
)
# ranges in which only Python works, where no operator does
PYTHON = (STEPS, STEP)

# Operators, and kernels of a device whose operator is not known. The first pattern that is found in
# a name decides.
_PATTERNS = (
    (COMMUNICATION, r"nccl|c10d::|gloo|all_?reduce|all_?gather|reduce_?scatter"),
    (ATTENTION, r"attention|attend_|flash|fmha"),
    (
        MATRIX_PRODUCTS,
        r"(^|[:_])(mm|bmm|addmm|baddbmm|matmul|linear|einsum|mv|addmv|dot|convolution)(_|$)"
        r"|gemm|gemv|cutlass|cublas|xmma|nvjet|widened_product|float8_times",
    ),
    (OPTIMIZER, r"_fused_(adam|sgd|adagrad)|multi_tensor_apply|Optimizer\."),
    (HEAD, r"cross_entropy|nll_loss|log_softmax"),
    (QUANTIZATION, r"quantize|nf4|int4"),
    (
        COPIES,
        r"copy|::to$|clone|contiguous|[Mm]em(cpy|set)|::(cat|stack|roll|repeat|fill|zero|zeros|ones"
        r"|full|pad)(_|$)|index|gather|scatter|embedding|masked_select|nonzero",
    ),
    (
        OTHER,
        r"::(view|reshape|_reshape_alias|_unsafe_view|transpose|t|permute|expand|slice|narrow"
        r"|select|split|unbind|as_strided|detach|alias|unsqueeze|squeeze|flatten|unflatten|empty"
        r"|empty_strided|empty_like|new_\w+|lift_fresh|item|_local_scalar_dense|is_nonzero"
        r"|resolve_\w+|result_type|set_|_to_\w+|chunk|movedim|unfold|numpy_T)(_|$)",
    ),
    # all that computes, and what a compiler makes of many operators
    (ELEMENTWISE, r"^aten::|triton_|CompiledFxGraph|CompiledFunction|elementwise|reduce|norm"),
)
_KINDS = tuple((kind, re.compile(pattern)) for kind, pattern in _PATTERNS)


def kind_of(name: str) -> str | None:
    """Kind of work of an operator or kernel, None of one that only calls others."""
    found = next((kind for kind, pattern in _KINDS if pattern.search(name)), None)
    return None if found == OTHER else found
