"""Numbers out of range in structs made in Python are named, as those of a file are."""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from minitune.algorithms.dp_sgd import Privacy
from minitune.algorithms.loss_scale import LossScale
from minitune.inference.sampling import Sampling
from minitune.lora import Lora
from minitune.losses import CrossEntropy, Dpo, ForwardKL, Kto
from minitune.optim import SGD, AdamW, AdamW8bit, ClipByGlobalNorm, Cosine, Muon, ScaleByGlob

GLOBS = ("*_proj.weight",)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "dropout": (lambda: Lora(2, 4.0, GLOBS, dropout=2.0), r"Lora: dropout is 2\.0, expected float < 1\.0"),
    "rank": (lambda: Lora(0, 4.0, GLOBS), r"Lora: rank is 0, expected int >= 1"),
    "rank of a glob": (lambda: Lora(2, 4.0, GLOBS, ranks={"*": 0}), r"Lora: ranks is \{'\*': 0\}, expected int >= 1"),
    "a float rank": (lambda: Lora(2.0, 4.0, GLOBS), r"Lora: rank is 2\.0, expected int, got float"),
    "alpha": (lambda: Lora(2, -8.0, GLOBS), r"Lora: alpha is -8\.0, expected float > 0\.0"),
    "a glob": (lambda: Lora(2, 8.0, "*_proj.weight"), r"Lora: targets is '\*_proj\.weight', expected array, got str"),
    "beta": (lambda: Dpo(beta=-1.0), r"Dpo: beta is -1\.0, expected float > 0\.0"),
    "replaced": (lambda: msgspec.structs.replace(Kto(), beta=0.0), r"Kto: beta is 0\.0, expected float > 0\.0"),
    "temperature": (lambda: ForwardKL(temperature=0.0), r"ForwardKL: temperature is 0\.0, expected"),
    "smoothing": (lambda: CrossEntropy(label_smoothing=2.0), r"CrossEntropy: label_smoothing is 2\.0, expected float < 1\.0"),
    "lr": (lambda: AdamW(lr=-1.0), r"AdamW: lr is -1\.0, expected float >= 0\.0"),
    "nan": (lambda: SGD(lr=float("nan")), r"SGD: lr is nan, expected float >= 0\.0"),
    "betas": (
        lambda: AdamW8bit(lr=1.0, betas=(1.5, 0.9)),
        r"AdamW8bit: betas is \(1\.5, 0\.9\), expected float < 1\.0 - at \$\[0\]",
    ),
    "momentum": (lambda: Muon(lr=0.1, momentum=1.0), r"Muon: momentum is 1\.0, expected float < 1\.0"),
    "norm": (lambda: ClipByGlobalNorm(0.0), r"ClipByGlobalNorm: max_norm is 0\.0, expected float > 0\.0"),
    "warmup": (lambda: Cosine(warmup_steps=-1), r"Cosine: warmup_steps is -1, expected"),
    "factors": (lambda: ScaleByGlob({"*": -1.0}), r"ScaleByGlob: factors is \{'\*': -1\.0\}, expected float >= 0\.0"),
    "sampling": (lambda: Sampling(temperature=-1.0), r"Sampling: temperature is -1\.0, expected float >= 0\.0"),
    "scale": (lambda: LossScale(backoff_factor=1.0), r"LossScale: backoff_factor is 1\.0, expected float < 1\.0"),
    "privacy": (lambda: Privacy(1.0, 1.0, 0, chunk=0), r"Privacy: chunk is 0, expected int >= 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_number_out_of_range_is_named(name: str) -> None:
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_numbers_of_numpy_and_tensors_are_taken_as_they_are() -> None:
    assert SGD(lr=np.float64(0.5)).lr == 0.5
    assert AdamW(lr=1, betas=(np.float32(0.5), 0.9)).betas == (0.5, 0.9)
    lr = torch.tensor(0.5)
    assert SGD(lr=lr).lr is lr
    with pytest.raises(ValueError, match=r"SGD: lr is np\.float64\(-0\.5\), expected float >= 0\.0"):
        SGD(lr=np.float64(-0.5))
