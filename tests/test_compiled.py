"""Blocks compiled once for all layers, steps and lengths, each in one graph; and what happens without a compiler.

In processes of their own: torch can't trace the checks of signatures that the tests run under.
"""

import os
import subprocess
import sys
from pathlib import Path

HEAD = """
import functools
import torch
from minitune import compiled, objectives, optim, quant, steps
from minitune.lora import Lora
from minitune.losses import CrossEntropy
from minitune.models import Model, gemma2, llama
from minitune.types import Batch
graphs, said = [], []
SIZES = {"n_heads": 4, "n_kv_heads": 2, "d_model": 16, "d_head": 6, "d_ff": 13, "vocab_size": 17}
def stepped(model, length, params, seed=0):
    rule, optimizer = Lora(3, 8.0, ("*_proj.weight",)), optim.SGD(0.1)
    deltas = rule.init(params, 0)
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(0, 17, (2, length), generator=generator)
    segments = 1 + (torch.rand(2, length, generator=generator) < 0.1).int().cumsum(1).int()
    batch = Batch(tokens, segments, torch.ones_like(tokens, dtype=torch.bool))
    step = steps.train_step(objectives.sft(model, CrossEntropy(), rule), optimizer, micro_batch=2)
    return step(params, deltas, optimizer.init(deltas), batch)
def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
"""
COUNTING = """
def counting(graph, inputs):
    graphs.append(1)
    return graph.forward
compiled._lowered, torch.compile = counting, functools.partial(torch.compile, fullgraph=True)
def counted(family, config, params, lengths=(9, 9, 14, 23, 17, 40)):
    torch._dynamo.reset()
    plain, wrapped = Model(family.FAMILY, config), Model(family.FAMILY, config, compiled.wrap(said.append))
    before = len(graphs)
    for n_remat in (0, 1):
        for length in lengths:
            ours, theirs = (stepped(m._replace(n_remat=n_remat), length, params) for m in (wrapped, plain))
            same(ours[0], theirs[0])
    return len(graphs) - before
"""
COUNTED = (
    COUNTING
    + """
found = []
for family, depth in ((llama, 2), (llama, 9), (gemma2, 2)):
    config = family.Config(n_layers=depth, **SIZES)
    found.append(counted(family, config, Model(family.FAMILY, config).init(0, 0.3)))
print(found, said)
"""
)
QUANTIZED = (
    COUNTING
    + """
mixed = {"*.self_attn.*": quant.Int4(32), "*.mlp.up_proj.weight": quant.Int8(), "*.mlp.gate_proj.weight": quant.Float8()}
found = []
for scheme, depth in ((None, 2), (quant.NF4(), 2), (quant.NF4(), 5)):
    config = llama.Config(n_layers=depth, **{**SIZES, "d_model": 32, "d_head": 8, "d_ff": 64})
    params = Model(llama.FAMILY, config).init(0, 0.3)
    params = params if scheme is None else quant.Quantization(scheme, exceptions=mixed).quantize(params)
    found.append(counted(llama, config, params, (9, 14, 23)))
print(found, said)
"""
)
DECODED = """
from torch._inductor import metrics
found, on_cpu = [], quant._levels
for scheme in (quant.Int4(32), quant.NF4()):
    q = quant.quantize(torch.randn(37, 96, generator=torch.Generator().manual_seed(0)), scheme)
    for form in (on_cpu, quant._levels_at_once):
        expected = quant.dequantize(q, torch.bfloat16)
        quant._levels = form
        metrics.reset(), torch._dynamo.reset()
        assert torch.equal(torch.compile(quant.dequantize, fullgraph=True)(q, torch.bfloat16), expected)
    found.append(metrics.generated_kernel_count)
print(found)
"""
KEPT = """
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from minitune import float8
from minitune.grad import kept_bytes
float8.takes = lambda x, codes: True  # torch multiplies them on a CPU too
def behind(node):
    found = set()
    while new := {above for below in found | {node} for above in below.all_input_nodes} - found:
        found |= new
    return found
def in_order(graph, inputs):
    given = [n for n in graph.graph.nodes if n.op == "placeholder" and n.meta["val"].shape == (40, 128)]
    previous = given[-1]  # x, or the cotangent behind what was kept
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.mm.default:
            assert previous in behind(node.args[1])  # a weight is decoded when what it multiplies is there, and no earlier
            previous = node
            graphs.append(1)
    return make_boxed_func(graph.forward)
backend = aot_autograd(fw_compiler=in_order, bw_compiler=in_order, partition_fn=min_cut_rematerialization_partition)
found = []
x = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
x[0, 0] = torch.inf
for scheme in (quant.Int8(), quant.Float8(), quant.Int4(32), quant.NF4()):
    first, second = (quant.quantize(w, scheme) for w in torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(1)))
    torch._dynamo.reset()
    def both(x, first, second):
        return quant.linear(quant.linear(x, first).tanh(), second)
    for run in (both, torch.compile(both, fullgraph=True, backend=backend)):
        leaf = x.clone().requires_grad_()
        found.append(torch.autograd.grad(run(leaf, first, second)[1:].float().square().sum(), leaf)[0][1:])
        kept = kept_bytes(run, x, first, second)
        assert kept <= x.nbytes + 1024 + 4096 < 128 * 128, kept
    assert found[-1].isfinite().all() and torch.equal(found[-1], found[-2])
print("codes", len(graphs))
"""
TWO = """
torch.compile = lambda block, **how: block
wrap, models = compiled.wrap(said.append), []
for cap in (None, 0.3):
    config = gemma2.Config(n_layers=2, **SIZES, attention_cap=cap, final_cap=None)
    models.append((Model(gemma2.FAMILY, config, wrap), Model(gemma2.FAMILY, config), Model(gemma2.FAMILY, config).init(0, 0.7)))
for ours, theirs, params in models + models:
    same(stepped(ours, 9, params)[0], stepped(theirs, 9, params)[0])
print("same")
"""
MANY = """
ran = []
def running(graph, inputs):
    return lambda *args: (ran.append(1), graph.forward(*args))[1]
compiled._lowered = running
for cap in range(1, 11):
    config = gemma2.Config(n_layers=1, **SIZES, attention_cap=float(cap), final_cap=None)
    params, before = Model(gemma2.FAMILY, config).init(0, 0.3), len(ran)
    stepped(Model(gemma2.FAMILY, config, compiled.wrap(said.append)), 9, params)
    print(len(ran) - before, end=" ")
print(said)
"""
UNLOWERED = """
from torch._inductor.lowering import register_lowering
@torch.library.custom_op("tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2
twice.register_fake(torch.empty_like)
twice.register_autograd(lambda ctx, d: d.sin())
@register_lowering(torch.ops.aten.sin.default)
def no_kernel(x):
    raise RuntimeError("needs 132 KiB of shared memory, the card has 99")
x = torch.full((3,), 0.5, requires_grad=True)
block = compiled.wrap(said.append)(lambda x: twice(x * 3))
for _ in range(2):
    same(block(x), x * 6)
    same(torch.autograd.grad(block(x), x, torch.ones(3)), (torch.ones(3).sin() * 3,))
print(len(said), said[0])
"""
PROBED = (
    COUNTING
    + """
from minitune.grad import value_and_grad
from minitune.models import Probe
from minitune.types import Mean
config = llama.Config(n_layers=3, **SIZES)
params = {name: w.double() for name, w in Model(llama.FAMILY, config).init(0, 0.3).items()}
tokens = torch.arange(18).view(2, 9) % 17
batch = Batch(tokens, torch.ones_like(tokens), tokens > 3)
def probed(model):
    received = []
    model = model._replace(probe=Probe(("self_attn.v_proj.weight", "mlp.up_proj.weight"), lambda *given: received.append(given)))
    def objective(leaves):
        received.clear()
        hidden = model.hidden(leaves, batch)
        return Mean(hidden.square().sum() + sum(y.sin().sum() for _, y in received), torch.ones(())), hidden
    answer = value_and_grad(objective, has_aux=True)(params)
    return [name for name, _ in received], [y.detach() for _, y in received], answer
wrap = compiled.wrap(said.append)
names, *wanted = probed(Model(llama.FAMILY, config))
for n_remat in (0, 2):
    found_names, *found = probed(Model(llama.FAMILY, config, wrap, n_remat=n_remat))
    assert found_names == names and len(names) == 6
    same(found, wanted)
print(len(graphs) > 0, said)
"""
)
WITHOUT = """
config = llama.Config(n_layers=2, **SIZES)
params = Model(llama.FAMILY, config).init(0, 0.3)
ours = stepped(Model(llama.FAMILY, config, compiled.wrap(said.append)), 9, params)
same(ours[0], stepped(Model(llama.FAMILY, config), 9, params)[0])
print(len(said), said[0])
"""
BROKEN = """
from minitune import compiled
def block():
    raise ValueError("of the block")
compiled.wrap(print)(block)()
"""


def output(program: str, **environment: str) -> str:
    words = [sys.executable, "-W", "ignore", "-c", HEAD + program]
    result = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_number_of_graphs_depends_on_neither_depth_nor_steps_nor_lengths() -> None:
    """One for the first layer, whose input needs no gradient, one for the others; both again for lengths of any size; and for
    a block that is computed again, its forward without a gradient. Every one is whole: no part of a block runs outside."""
    shallow, deep, two_kinds = eval(output(COUNTED).replace(" []", ""))
    assert shallow == deep
    assert shallow <= 7
    assert two_kinds <= 2 * shallow


def test_quantized_weights_add_no_graph() -> None:
    """A block over codes of all schemes is one graph wherever a block over plain weights is, at any depth and length."""
    found = eval(output(QUANTIZED).replace(" []", ""))
    assert found == [found[0]] * 3
    assert found[0] <= 7


def test_decoding_a_weight_is_one_kernel_as_a_gpu_would_run_it_and_changes_no_bit() -> None:
    assert eval(output(DECODED)) == [1, 1]


def test_no_decoded_weight_is_kept_or_made_before_its_product_eager_or_compiled() -> None:
    assert output(KEPT) == "codes 12\n"


def test_one_wrap_around_two_models_keeps_them_apart() -> None:
    assert output(TWO) == "same\n"


def test_models_of_any_number_in_one_process_all_stay_compiled() -> None:
    """torch's limit of 8 graphs is not shared by all blocks: ten models of one layer run compiled, every one."""
    assert output(MANY) == "1 " * 10 + "[]\n"


def test_a_backward_without_a_kernel_is_found_before_the_first_forward_has_run() -> None:
    """As where a card's shared memory is too small for a head's gradient: later nothing could be run in the block's place."""
    told = output(UNLOWERED)
    assert told.startswith("1 compiled: blocks run as they are, because torch.compile could not compile them (Lowering")
    assert "needs 132 KiB" in told


def test_a_probe_of_compiled_blocks_receives_the_same_outputs_and_gradients() -> None:
    assert output(PROBED) == "True []\n"


def test_without_a_compiler_blocks_run_as_they_are_and_say_so_once(tmp_path: Path) -> None:
    told = output(WITHOUT, CXX=str(tmp_path / "no-compiler"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert told.startswith("1 compiled: blocks run as they are, because torch.compile could not compile them (InvalidCxxCompiler")


def test_an_error_of_the_block_is_the_blocks_own() -> None:
    result = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True)
    assert result.returncode == 1
    assert "ValueError: of the block" in result.stderr
    assert result.stdout == ""
