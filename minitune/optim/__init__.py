"""Optimizers as pure transforms of gradients: `init(params) -> state`, `update(grads, state,
params) -> (updates, state)`.

Updates are added to the parameters by `apply_gradients`, which is the one place that writes them.
"""

from minitune.optim.adamw import AdamState as AdamState
from minitune.optim.adamw import AdamW as AdamW
from minitune.optim.apply import apply_gradients as apply_gradients
from minitune.optim.decay_groups import decay_groups as decay_groups
from minitune.optim.eight_bit import AdamW8bit as AdamW8bit
from minitune.optim.muon import Muon as Muon
from minitune.optim.partition import Partition as Partition
from minitune.optim.partition import partition as partition
from minitune.optim.registry import Optimizer as Optimizer
from minitune.optim.rounding import RoundStochastically as RoundStochastically
from minitune.optim.schedules import Constant as Constant
from minitune.optim.schedules import Cosine as Cosine
from minitune.optim.schedules import Linear as Linear
from minitune.optim.schedules import ScaleBySchedule as ScaleBySchedule
from minitune.optim.schedules import Schedule as Schedule
from minitune.optim.sgd import SGD as SGD
from minitune.optim.transforms import Chain as Chain
from minitune.optim.transforms import ClipByGlobalNorm as ClipByGlobalNorm
from minitune.optim.transforms import GradientTransformation as GradientTransformation
from minitune.optim.transforms import ScaleByGlob as ScaleByGlob
from minitune.optim.transforms import chain as chain
