"""Steps on an accelerator: nothing waits for it, nothing lies on the wrong device, and nothing asks for what it lacks."""

from typing import Any

import pytest
import torch
from models_for_tests import SMALL, random_batch, random_params

from device_for_tests import META, WITHOUT_FLOAT64, on_device, simulated
from minitune import hardware, objectives, optim, tree
from minitune.lora import Lora
from minitune.losses import Dpo, ForwardKL, Kto, Orpo
from minitune.models import Model, llama
from minitune.objectives import Teacher
from minitune.types import Judged, Pairs, Taught

MODEL = Model(llama.FAMILY, SMALL)
RULE = Lora(rank=2, alpha=4.0, targets=("*_proj.weight",))
ROWS = random_batch(SMALL, 4, 9)
PAIRS = Pairs(ROWS, random_batch(SMALL, 4, 7, seed=1))
JUDGED = Judged(ROWS, PAIRS.rejected, torch.tensor([True, False, False, True]))
TOPS = Taught(ROWS, torch.randint(0, 17, (4, 9, 3)), torch.randn(4, 9, 3).log_softmax(-1))
LOGPS = torch.randn(4, 2)


class Plain:
    """Gradient descent that reads no count, so that what a test sees is the objective and the step."""

    def init(self, params: Any) -> Any:
        return ()

    def update(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return tree.map(lambda g: -0.1 * g, grads), ()


def teacher(params: Any) -> Teacher:
    return Teacher(MODEL, params)


def lora_objectives(params: Any) -> dict[str, tuple[Any, Any]]:
    """(objective, batch on the host) of every kind of step."""
    return {
        "sft": (objectives.sft(MODEL, RULE), ROWS),
        "dpo": (objectives.preference(MODEL, RULE, Dpo(), {}), PAIRS),
        "dpo with a cached reference": (objectives.preference(MODEL, RULE, Dpo(), None), PAIRS._replace(reference=LOGPS)),
        "orpo": (objectives.preference(MODEL, RULE, Orpo(), None), PAIRS),
        "kto": (objectives.unpaired_preference(MODEL, Kto(), RULE, {}), JUDGED),
        "kto with a cached reference": (
            objectives.unpaired_preference(MODEL, Kto(), RULE, None),
            JUDGED._replace(reference=LOGPS),
        ),
        "kd": (objectives.distillation(MODEL, RULE, ForwardKL(), teacher(params)), ROWS),
        "kd with a cached teacher": (objectives.distillation(MODEL, RULE, ForwardKL(), None), TOPS),
    }


KINDS = list(lora_objectives({}))
OPTIMIZERS = {
    "no counts": Plain(),
    "sgd": optim.SGD(lr=0.1),
    "adamw": optim.chain(optim.ClipByGlobalNorm(1.0), optim.AdamW(lr=0.1), optim.ScaleBySchedule(optim.Cosine(), 10)),
}


def deltas_of(params: Any) -> Any:
    return RULE.init(params, 0)


def value_and_gradient(objective: Any, params: Any, trainable: Any, batch: Any) -> Any:
    from minitune.grad import value_and_grad

    return value_and_grad(lambda leaves: objective(leaves, params, batch), has_aux=True)(trainable)


@pytest.mark.parametrize("capabilities", [WITHOUT_FLOAT64], ids=["without float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_objective_waits_for_the_device(kind: str, capabilities: hardware.Capabilities) -> None:
    with simulated(capabilities):
        params = on_device(random_params(SMALL))
        deltas = on_device(deltas_of(random_params(SMALL)))
        objective, batch = lora_objectives(params)[kind]
        (mean, extras), grads = value_and_gradient(objective, params, deltas, batch)
        assert {x.device for x in tree.leaves((mean, extras, grads))} == {META}
