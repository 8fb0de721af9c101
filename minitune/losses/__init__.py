"""Losses: pure functions and, right under each, the struct that a program writes; the unions here are the registry.

A loss gives one value a row and averages nothing. Tokens come as logits [n, V]; answers as log-probabilities of whole answers
[B], sums unless the function says averages: sums over the answer's tokens divided by their number.
"""

from minitune.losses.distillation import ForwardKL, JensenShannon, ReverseKL, SymmetricKL
from minitune.losses.distillation import forward_kl as forward_kl
from minitune.losses.distillation import jensen_shannon as jensen_shannon
from minitune.losses.distillation import reverse_kl as reverse_kl
from minitune.losses.distillation import symmetric_kl as symmetric_kl
from minitune.losses.preference import Cpo, Dpo, Hinge, Ipo, Orpo, SimPO
from minitune.losses.preference import cpo as cpo
from minitune.losses.preference import dpo as dpo
from minitune.losses.preference import hinge as hinge
from minitune.losses.preference import ipo as ipo
from minitune.losses.preference import orpo as orpo
from minitune.losses.preference import simpo as simpo
from minitune.losses.token import CrossEntropy
from minitune.losses.token import cross_entropy as cross_entropy
from minitune.losses.unpaired import Kto
from minitune.losses.unpaired import kto as kto

TokenLoss = CrossEntropy
PairLoss = Dpo | Ipo | Hinge | SimPO | Orpo | Cpo
UnpairedLoss = Kto
DistillationLoss = ForwardKL | ReverseKL | SymmetricKL | JensenShannon
Loss = TokenLoss | PairLoss | UnpairedLoss | DistillationLoss
