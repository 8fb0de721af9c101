"""Facts about the processor or accelerator that a tensor lies on; all questions of that kind are
asked here.
"""

import os
from collections.abc import Callable, Mapping
from functools import wraps
from types import MappingProxyType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

BFLOAT16_EXTENSIONS = ("avx512_bf16", "amx_bf16", "bf16")  # of x86 and, the last, of Arm
LIMITED_TO_AVX2 = {
    "ATEN_CPU_CAPABILITY": ("avx2", "default"),
    "ONEDNN_MAX_CPU_ISA": ("AVX2", "AVX", "SSE41"),
}
MPS_BFLOAT16_MACOS = (14, 0)  # the first macOS whose Metal has bfloat16


class Capabilities(NamedTuple):
    """Abilities of torch on a type of device."""

    float64: bool
    streams: bool  # copies to and from pinned memory on a side stream, which events put in order
    compiles: bool  # torch.compile is worth its seconds without being asked for


CAPABILITIES: Mapping[str, Capabilities] = MappingProxyType(
    {
        "cpu": Capabilities(float64=True, streams=False, compiles=False),
        "cuda": Capabilities(float64=True, streams=True, compiles=True),
        # client cards have no float64
        "xpu": Capabilities(float64=False, streams=True, compiles=True),
        "mps": Capabilities(float64=False, streams=False, compiles=False),
    }
)
# of a type of device that the table does not name
LEAST = Capabilities(float64=False, streams=False, compiles=False)


def capabilities(device: torch.device) -> Capabilities:
    """Row of CAPABILITIES for a device."""
    return CAPABILITIES.get(device.type, LEAST)


def accelerator() -> str | None:
    """Type of accelerator that torch finds on this machine, if it is one of CAPABILITIES."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return device.type if device is not None and device.type in CAPABILITIES else None


def is_accelerator(device: torch.device) -> bool:
    """True if work on the device is queued by the host, which goes on meanwhile."""
    return device.type != "cpu"


def multiplies_bfloat16(device: torch.device) -> bool:
    """True if the device has matrix products of bfloat16 in hardware.

    On CUDA that is Ampere and later, on MPS macOS 14 and later; on a CPU it is AVX512-BF16, AMX or
    Arm's extension, unless the environment variables ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA
    tell torch to use none of them. The meta device stands for an accelerator that is not in this
    machine, for which something is planned: it has them.
    """
    if device.type == "meta":
        return True
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "xpu":
        return torch.xpu.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(*MPS_BFLOAT16_MACOS)
    if any(os.environ.get(name) in values for name, values in LIMITED_TO_AVX2.items()):
        return False
    features = torch.cpu.get_capabilities()
    return any(features.get(name, False) for name in BFLOAT16_EXTENSIONS)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype of activations for weights of `dtype`: float32 in place of a bfloat16 that the device
    does not multiply.

    torch emulates such products, about fifty times slower than those of float32.
    """
    return torch.float32 if dtype == torch.bfloat16 and not multiplies_bfloat16(device) else dtype


def cuda_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, for kernels that exist for CUDA alone; (0, 0) for any
    other device.
    """
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def is_asynchronous(device: torch.device) -> bool:
    """True if operations are queued on the device, so that reading a value makes the host wait for
    all before it.
    """
    return device.type != "cpu"


def widest_float(device: torch.device) -> torch.dtype:
    """float64 where the device has it, else float32."""
    return torch.float64 if capabilities(device).float64 else torch.float32


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on the device; a copy from the host is queued there and the host does not wait for it.

    It goes through pinned memory, which torch's allocator keeps until the copy is done. Where a
    device has no such copies the host waits, because torch may else read the memory of x after it
    was freed. Tensors without memory of their own, fake ones and those of a functorch transform,
    are not pinned.
    """
    if x.device == device or x.device.type != "cpu" or not capabilities(device).streams:
        return x.to(device)
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)  # pyright: ignore[reportAttributeAccessIssue]
    if type(x) is not Tensor or wrapped:
        return x.to(device, non_blocking=True)
    return pinned(x).to(device, non_blocking=True)


def reading(x: Tensor) -> Callable[[], Tensor]:
    """Begin to copy x to the host; the function that is returned waits for that copy alone and
    returns it.

    Work that is queued on the device after this call goes on meanwhile.
    """
    if not capabilities(x.device).streams:
        return lambda: x.to("cpu")
    streams = _module(x.device)
    copy, done = x.to("cpu", non_blocking=True), streams.Event()
    done.record(streams.current_stream(x.device))

    def read() -> Tensor:
        done.synchronize()
        return copy

    return read


class SideStream(NamedTuple):
    """Copies beside the computation of an accelerator. No call makes the host wait."""

    # begins to copy a tensor to another device; its source must live until it was waited for
    copied: Callable[[Tensor, torch.device], Any]
    # lets what is computed from here on come after a copy, and returns its result
    wait: Callable[[Any], Tensor]


def side_stream(device: torch.device) -> SideStream:
    """Copies to and from the pinned memory of the host, on a stream of their own."""
    streams = _module(device)
    side = streams.Stream(device)

    def copied(x: Tensor, to: torch.device) -> tuple[Tensor, Any]:
        # waited for: what computes x, and what still reads the memory that the side stream may be
        # given for this copy. So no tensor needs record_stream, which frees memory only once the
        # device has caught up with a host that runs far ahead
        side.wait_stream(streams.current_stream(device))
        with streams.stream(side):
            # to the host, such a copy is pinned
            return x.to(to, non_blocking=True), side.record_event()

    def wait(copy: tuple[Tensor, Any]) -> Tensor:
        streams.current_stream(device).wait_event(copy[1])
        return copy[0]

    return SideStream(copied, wait)


def queued(device: torch.device) -> Callable[[], None]:
    """Function that waits for the work that is queued on a device by now, and for none that comes
    later; another thread may call it.
    """
    if not capabilities(device).streams:
        return lambda: None
    streams = _module(device)
    done = streams.Event()
    done.record(streams.current_stream(device))
    return done.synchronize


def peak_bytes(device: torch.device) -> int:
    """Most memory that tensors on an accelerator have had; of MPS, which counts no peak, what the
    process holds of it now.
    """
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return _module(device).max_memory_allocated(device)


def total_bytes(device: torch.device) -> int:
    """All memory of an accelerator; of MPS, which shares the machine's, what Metal recommends to
    use at most.
    """
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return _module(device).get_device_properties(device).total_memory


def profiled(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator of a function whose calls are a range of that name in a profile of torch.

    While nothing is recorded a call takes less than a microsecond more, and a graph of
    torch.compile is the same as without it.
    """

    def decorate(f: Callable[P, T]) -> Callable[P, T]:
        @wraps(f)
        def ranged(*args: P.args, **kwargs: P.kwargs) -> T:
            if torch.compiler.is_compiling() or not _is_recorded():
                return f(*args, **kwargs)
            with torch.profiler.record_function(name):
                return f(*args, **kwargs)

        return ranged

    return decorate


def _is_recorded() -> bool:
    """True while a profiler of torch records."""
    return torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]


def pinned(x: Tensor) -> Tensor:
    """x of the host in memory from which a device copies by itself; x where it lies there."""
    return x.pin_memory()


def _module(device: torch.device) -> Any:
    """torch.cuda, torch.xpu or torch.mps."""
    return torch.get_device_module(device)
