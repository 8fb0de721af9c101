"""Gradients of pure functions over trees, recomputation and offloading."""

from minitune.autodiff.remat import remat as remat
from minitune.autodiff.value_and_grad import accumulate as accumulate
from minitune.autodiff.value_and_grad import per_example as per_example
from minitune.autodiff.value_and_grad import value_and_grad as value_and_grad
