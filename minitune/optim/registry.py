"""Every optimizer that a program can name; a new one is a file of its own and a word here."""

from minitune.optim.adamw import AdamW
from minitune.optim.eight_bit import AdamW8bit
from minitune.optim.muon import Muon
from minitune.optim.sgd import SGD

Optimizer = AdamW | AdamW8bit | SGD | Muon
