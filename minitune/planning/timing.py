"""Least time that a step can take on a device, and the time that is expected of it.

The roof of Williams, Waterman & Patterson 2009, doi 10.1145/1498765.1498785: what a step
multiplies, moves through memory, sends and fetches, each at the rate of the device; the slowest
binds.
"""

from typing import Literal, NamedTuple

from minitune import hardware
from minitune.planning.devices import Device
from minitune.planning.offloading import fetch_rate, fetched_bytes
from minitune.planning.rank_leaves import local_bytes, used_bytes
from minitune.planning.step_spec import Parts, StepSpec
from minitune.planning.traffic import Traffic, sending_s, summed_up, transfers

Resource = Literal["products", "memory", "links", "copies"]
# reads and writes of what trains in an update: the gradient and each moment are read, and what
# changes is written; of an activation: it is written, read by what follows, and by the backward
UPDATE_PASSES, ACTIVATION_PASSES = 2, 3


class Timing(NamedTuple):
    """Seconds of an optimizer step on each of the ranks."""

    products_s: float  # at the rate of dense products
    memory_s: float  # at the rate of the memory
    overlapped_s: float  # sending weights and gradients beside the products
    exposed_s: float  # summing gradients between copies, when all products are done
    expected_s: float
    sent: Traffic
    fetched: int = 0  # bytes of frozen blocks that come to the device, from the host or a file
    fetched_s: float | None = 0.0  # bringing them, beside the products; None: how fast is not known
    exchanged_s: float = 0.0  # sending activations, for which the products wait

    @property
    def roof_s(self) -> float:
        """Least time of a step."""
        beside = max(self.overlapped_s, self.fetched_s or 0.0)
        return max(self.products_s, self.memory_s, beside) + self.exposed_s + self.exchanged_s

    @property
    def binds(self) -> Resource:
        """Resource that a step waits for most at its roof."""
        of_links = self.exposed_s + self.overlapped_s + self.exchanged_s
        seconds: dict[Resource, float] = {
            "products": self.products_s,
            "memory": self.memory_s,
            "links": of_links,
            "copies": self.fetched_s or 0.0,
        }
        return max(seconds, key=lambda name: seconds[name])

    @property
    def hides_fetched(self) -> bool:
        """True if frozen blocks come in less time than the products are expected to take."""
        return (self.fetched_s or 0.0) < self._products_expected_s

    @property
    def hides_overlapped(self) -> bool:
        """True if what is sent beside the products takes no longer than they are expected to."""
        return self.overlapped_s < self._products_expected_s

    @property
    def _products_expected_s(self) -> float:
        """Time without what is sent while no product is computed."""
        return self.expected_s - self.exposed_s - self.exchanged_s


def timing(step: StepSpec, flops_per_token: float, parts: Parts, device: Device) -> Timing:
    """Time of a step on a device. parts: its memory at the fullest moment."""
    n_tokens = step.n_rows * step.mesh.own_tokens(step.n_tokens) * step.n_micro_batches
    like = step.params["model.embed_tokens.weight"]
    rate = device.rate(hardware.product_dtype(like.dtype, step.device))
    products_s = flops_per_token * n_tokens / rate
    memory_s = _moved_bytes(step, parts) / device.memory_bytes_per_s
    found = transfers(step)
    sent = summed_up(found)
    overlapped_s = sending_s(found, ("gathered", "scattered"), device)
    exposed_s = sending_s(found, ("summed",), device)
    exchanged_s = sending_s(found, ("exchanged",), device)
    fetched, fetched_s = fetched_bytes(step), 0.0
    if fetched:
        speed = fetch_rate(step.blocks, device)
        fetched_s = None if speed is None else fetched / speed
    # what a training attains of the products has its other operations in it
    attained_s = products_s / device.attained
    slowest_s = max(attained_s, memory_s, overlapped_s, fetched_s or 0.0)
    expected_s = slowest_s + exposed_s + exchanged_s
    seconds = products_s, memory_s, overlapped_s, exposed_s, expected_s
    return Timing(*seconds, sent, fetched, fetched_s, exchanged_s)


def _moved_bytes(step: StepSpec, parts: Parts) -> float:
    """Least bytes through a rank's memory in a step: weights in every forward and backward,
    activations, and what an update reads and writes."""
    weights = used_bytes(step.params, step.mesh) + used_bytes(step.trainable, step.mesh)
    passes = 2 + step.model.n_remat / step.model.config.n_layers
    of_batch = passes * weights + ACTIVATION_PASSES * parts.get("activations", 0)
    trained = local_bytes(step.trainable, step.mesh)
    update = UPDATE_PASSES * (trained + parts.get("optimizer", 0)) + trained
    return step.n_micro_batches * of_batch + update
