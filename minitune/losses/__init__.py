"""Losses: pure functions and, right under each, the struct that a program writes.

A loss gives one value a row and averages nothing. Tokens come as logits [n, V]; answers as [B],
sums of log-probabilities over an answer's tokens, or averages where the function says so.
"""

from minitune.losses.distillation import ForwardKL as ForwardKL
from minitune.losses.distillation import JensenShannon as JensenShannon
from minitune.losses.distillation import ReverseKL as ReverseKL
from minitune.losses.distillation import SymmetricKL as SymmetricKL
from minitune.losses.distillation import forward_kl as forward_kl
from minitune.losses.distillation import jensen_shannon as jensen_shannon
from minitune.losses.distillation import reverse_kl as reverse_kl
from minitune.losses.distillation import symmetric_kl as symmetric_kl
from minitune.losses.preference import ApoDown as ApoDown
from minitune.losses.preference import ApoZero as ApoZero
from minitune.losses.preference import Cpo as Cpo
from minitune.losses.preference import Dpo as Dpo
from minitune.losses.preference import Hinge as Hinge
from minitune.losses.preference import Ipo as Ipo
from minitune.losses.preference import Orpo as Orpo
from minitune.losses.preference import SimPO as SimPO
from minitune.losses.preference import apo_down as apo_down
from minitune.losses.preference import apo_zero as apo_zero
from minitune.losses.preference import cpo as cpo
from minitune.losses.preference import dpo as dpo
from minitune.losses.preference import hinge as hinge
from minitune.losses.preference import ipo as ipo
from minitune.losses.preference import orpo as orpo
from minitune.losses.preference import simpo as simpo
from minitune.losses.registry import DistillationLoss as DistillationLoss
from minitune.losses.registry import Loss as Loss
from minitune.losses.registry import PairLoss as PairLoss
from minitune.losses.registry import TokenLoss as TokenLoss
from minitune.losses.registry import UnpairedLoss as UnpairedLoss
from minitune.losses.token import CrossEntropy as CrossEntropy
from minitune.losses.token import cross_entropy as cross_entropy
from minitune.losses.unpaired import Kto as Kto
from minitune.losses.unpaired import kto as kto
