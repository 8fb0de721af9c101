"""Unions of the losses of each kind: a loss that is listed here is known to TOML, to the schema and
to the contract tests.
"""

from minitune.losses.distillation import ForwardKL, JensenShannon, ReverseKL, SymmetricKL
from minitune.losses.preference import ApoDown, ApoZero, Cpo, Dpo, Hinge, Ipo, Orpo, SimPO
from minitune.losses.token import CrossEntropy
from minitune.losses.unpaired import Kto

TokenLoss = CrossEntropy
PairLoss = Dpo | Ipo | Hinge | ApoZero | ApoDown | SimPO | Orpo | Cpo
UnpairedLoss = Kto
DistillationLoss = ForwardKL | ReverseKL | SymmetricKL | JensenShannon
Loss = TokenLoss | PairLoss | UnpairedLoss | DistillationLoss
