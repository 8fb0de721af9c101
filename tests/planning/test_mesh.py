"""Plans of ranks on any mesh, beside what a rank measures, and beside closed forms."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minitune.models.experts import Experts
from minitune.models.families import llama, qwen3_moe
from minitune.models.weights import shapes
from minitune.planning.activations import n_remat
from minitune.planning.memory import peak_memory
from minitune.planning.mesh import Mesh
from minitune.planning.shared_blocks import token_shares
from minitune.planning.traffic import traffic
from support.models import model_of
from support.planned_ranks import Planned, measured, small_chunks
from support.ranks import Ranks

SIZES = {"n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "d_model": 90, "d_head": 14, "d_ff": 262, "vocab_size": 1031}
SMALL = llama.Config(**SIZES)
# a rank has columns for whole blocks of NF4
EVEN = llama.Config(**{**SIZES, "n_heads": 8, "d_model": 128, "d_head": 32, "d_ff": 384})
# tokens are planned as spread evenly over experts: here they are, because all go to all
MIXTURE = qwen3_moe.Config(**SIZES, tie_embeddings=False, experts=Experts(n_experts=4, n_active=4, d_ff=98, names="qwen"))
CASES = {
    "lora, fsdp": Planned(SMALL, 0, "lora", "fsdp", {"data": 2}, 3, 131),
    "full, fsdp": Planned(SMALL, 3, "full", "fsdp", {"data": 2}, 3, 131),
    "lora, rows shared": Planned(SMALL, 0, "lora", "dp", {"context": 2}, 3, 731),
    "lora, cp, key heads that are repeated": Planned(
        llama.Config(**{**SIZES, "n_kv_heads": 3}), 3, "lora", "cp", {"data": 1, "context": 2}, 3, 731
    ),
    "lora, cp": Planned(SMALL, 0, "lora", "cp", {"data": 1, "context": 2}, 3, 731),
    "lora, cp, blocks again": Planned(SMALL, 3, "lora", "cp", {"data": 1, "context": 2}, 3, 731),
    "full, cp": Planned(SMALL, 0, "full", "cp", {"data": 1, "context": 2}, 3, 731),
    "full, cp on four ranks": Planned(SMALL, 3, "full", "cp", {"data": 2, "context": 2}, 2, 731),
    "lora, tp_fsdp": Planned(SMALL, 0, "lora", "tp_fsdp", {"data": 1, "tensor": 2}, 3, 131),
    "full, tp_fsdp on four ranks": Planned(SMALL, 3, "full", "tp_fsdp", {"data": 2, "tensor": 2}, 3, 131),
    "lora on nf4, tp_fsdp": Planned(EVEN, 0, "lora", "tp_fsdp", {"data": 2, "tensor": 2}, 3, 131, base="nf4"),
    "lora, ep": Planned(MIXTURE, 0, "lora", "ep", {"data": 1, "expert": 2}, 1, 131),
    "full, ep on four ranks": Planned(MIXTURE, 3, "full", "ep", {"data": 2, "expert": 2}, 1, 131),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rank_takes_the_memory_and_sends_the_bytes_that_are_planned_for_it(ranks: Ranks, name: str) -> None:
    case = CASES[name]
    n, n_sharers = math.prod(case.axes.values()), case.axes.get("context", 1) * case.axes.get("tensor", 1)
    found = ranks.run(n, measured, case)
    step = case.step()
    with small_chunks():
        planned = sum(peak_memory(step).values())
        of_whole_rows = sum(peak_memory(step._replace(mesh=step.mesh._replace(shares_rows=False))).values())
    sent = traffic(step)
    for one in found:
        assert one.peak == pytest.approx(planned, rel=0.05)
        if n_sharers > 1:
            assert one.peak < 0.75 * of_whole_rows
        # losses of tokens travel to all ranks by a gather and a scatter
        losses = 4 * case.n_rows * -(-case.n_tokens // n_sharers) * (n_sharers - 1)
        # where the first block's input has no gradient nothing is sent back to it; before rows their numbers are sent
        few = {"lora, tp_fsdp": 0.05, "lora, ep": 1e-3, "full, ep on four ranks": 1e-3}
        near = few.get(name.replace(" on nf4", ""), 1e-6)
        assert one.sent["exchange"] == pytest.approx(sent.exchanged - 2 * losses, rel=near)
        assert one.sent["gather"] == pytest.approx(sent.gathered + losses, rel=0.01)
        assert one.sent["scatter"] == pytest.approx(sent.scattered + losses, rel=0.01)
        assert one.sent["sum"] == pytest.approx(sent.summed, abs=2000)  # the norms of gradients are summed too


def test_a_budget_is_measured_on_the_tokens_of_a_rank() -> None:
    """Half of the tokens keep about half, so that blocks need not be computed again on two ranks where they are on one."""
    with FakeTensorMode():
        model, params = model_of(SMALL), {name: torch.empty(size) for name, size in shapes(SMALL).items()}
        sharing = model._replace(shares=token_shares(Mesh({"context": 2})))
        fewest = next(n for n in range(4, 64) if n_remat(sharing, params, 3, 731, n * 2**20) == 0)
        assert n_remat(model, params, 3, 731, fewest * 2**20) > 1
        assert n_remat(model, params, 3, 731, (2 * fewest + 1) * 2**20) == 0
