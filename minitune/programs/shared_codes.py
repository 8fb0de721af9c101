"""Codes of quantized weights that ranks would share, checked before anything is loaded."""

from minitune.models.weights import dims
from minitune.planning.mesh import Mesh
from minitune.programs.plan import PlanState, PlanTarget, codes_of
from minitune.programs.program import Program
from minitune.programs.state import AbstractState
from minitune.sharding.tensor_parallel import AXIS


def check_shared_codes(source: Program, first: AbstractState, mesh: Mesh) -> None:
    """InputError for a stage that quantizes weights to codes which the ranks of a mesh can't share
    out. first: the state before the first stage."""
    if mesh.n_sharing(AXIS) == 1:
        return
    # torch's DTensor takes more than half a second to import
    from minitune.sharding.placements import check_codes, placements

    plan = PlanState(first, source.model, PlanTarget(mesh=mesh))
    for stage in source.stage:
        plan = plan.after(stage)
        named = dims(plan.abstract.model.config)
        for name, leaf in codes_of(plan).items():
            placed = placements(name, leaf.shape, named[name], mesh.plan, mesh.axes)
            check_codes(name, leaf, placed, mesh.axes)
