"""Codes and optimizers of weights that ranks would share, checked before anything is loaded."""

from minitune.algorithms.shared_state import check_shared
from minitune.models.weights import dims
from minitune.planning.mesh import Mesh
from minitune.programs.plan import PlanState, PlanTarget, codes_of
from minitune.programs.program import Program
from minitune.programs.stages.train import Train
from minitune.programs.state import AbstractState, trainable_like
from minitune.sharding.tensor_parallel import AXIS


def check_shared_weights(source: Program, first: AbstractState, mesh: Mesh) -> None:
    """InputError for a stage that quantizes weights to codes which the ranks of a mesh can't share
    out, and for one that updates parts of weights by an optimizer that wants them whole. first: the
    state before the first stage."""
    if mesh.n_ranks == 1 or not mesh.plan:
        return
    plan = PlanState(first, source.model, PlanTarget(mesh=mesh))
    for stage in source.stage:
        plan = plan.after(stage)
        if mesh.n_sharing(AXIS) > 1:
            _check_codes(plan, mesh)
        if isinstance(stage, Train) and plan.abstract.whole:
            _check_optimizer(stage, plan, mesh)


def _check_codes(plan: PlanState, mesh: Mesh) -> None:
    # torch's DTensor takes more than half a second to import
    from minitune.sharding.placements import check_codes, placements

    named = dims(plan.abstract.model.config)
    for name, leaf in codes_of(plan).items():
        placed = placements(name, leaf.shape, named[name], mesh.plan, mesh.axes)
        check_codes(name, leaf, placed, mesh.axes)


def _check_optimizer(stage: Train, plan: PlanState, mesh: Mesh) -> None:
    trainable = trainable_like(plan.abstract, plan.narrow)
    cuts = mesh.for_model(plan.abstract.model.config).cuts
    shared = [name for name in cuts if name in trainable]
    check_shared(stage.optimizer_for(trainable, seed=0), trainable, shared)
