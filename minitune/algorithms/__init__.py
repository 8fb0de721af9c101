"""Methods of training: objectives, and the steps that need more than one."""

from minitune.algorithms.distillation import Teacher as Teacher
from minitune.algorithms.distillation import TeacherLoss as TeacherLoss
from minitune.algorithms.distillation import distillation as distillation
from minitune.algorithms.objective import Objective as Objective
from minitune.algorithms.objective import answer_logps as answer_logps
from minitune.algorithms.objective import apply_trainable as apply_trainable
from minitune.algorithms.objective import split_trainable as split_trainable
from minitune.algorithms.preference import PreferenceLoss as PreferenceLoss
from minitune.algorithms.preference import pair_logps as pair_logps
from minitune.algorithms.preference import preference as preference
from minitune.algorithms.quantization_aware import quantization_aware as quantization_aware
from minitune.algorithms.supervised import SupervisedLoss as SupervisedLoss
from minitune.algorithms.supervised import sft as sft
from minitune.algorithms.unpaired import unpaired_preference as unpaired_preference
