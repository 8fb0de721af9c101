"""Times and memory of a recorded trace by kind of work: a function of the trace alone.

A trace is what torch.profiler exports and Perfetto shows. Its operators are nested in time on each
thread. An operator's own time is what is left without those that it calls.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from minitune.errors import InputError
from minitune.programs.profiling import kinds

OPERATOR, RANGE = "cpu_op", "user_annotation"
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
MEMORY = "[memory]"
LINK = "fwdbwd"  # from an operator to the one that computes its gradient

Begin = tuple[int | str, float]  # thread and time at which an operator begins


class Arguments(msgspec.Struct, frozen=True):
    """Arguments of an event that are read here."""

    external_id: int | str | None = msgspec.field(name="External id", default=None)
    bytes: int | str = msgspec.field(name="Bytes", default=0)
    address: int | str = msgspec.field(name="Addr", default=0)
    device_type: int | str = msgspec.field(name="Device Type", default=0)


class Event(msgspec.Struct):
    """Event of a trace; times are in microseconds."""

    ph: str
    name: str = ""
    ts: float = 0.0
    dur: float = 0.0
    cat: str = ""
    tid: int | str = 0
    id: int | str = 0
    args: Arguments = Arguments()

    @property
    def end(self) -> float:
        """Time at which it is over."""
        return self.ts + self.dur


class Trace(msgspec.Struct):
    """File of a trace."""

    events: list[Event] = msgspec.field(name="traceEvents")


class Work(msgspec.Struct):
    """Work of one kind in a trace."""

    time_us: float = 0.0
    calls: int = 0  # operators that begin this kind of work, or kernels of a device
    allocated_bytes: int = 0  # in all
    peak_bytes: int = 0  # at the moment at which most is allocated


class Measured(NamedTuple):
    """Recorded steps by kind of work."""

    time_us: float  # from their begin to their end
    is_of_device: bool  # times are those of an accelerator's kernels
    work: dict[str, Work]

    @property
    def peak_bytes(self) -> int:
        """Most memory that was allocated in these steps and was there at once."""
        return sum(one.peak_bytes for one in self.work.values())


class _Open(NamedTuple):
    """Operator that is not over yet."""

    event: Event
    kind: str
    is_range: bool  # all that it calls is of its kind


def decode(content: bytes) -> Trace:
    """Trace of a file's content; InputError for what is none."""
    try:
        return msgspec.json.decode(content, type=Trace)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"profile: the trace can't be read ({error}), expected what torch.profiler exports; "
            "record it again"
        ) from None


def measure(trace: Trace) -> Measured:
    """Time, calls and memory of the recorded steps by kind of work.

    Of a trace with kernels the times are theirs, each moment counted once, and the rest is idle.
    Else they are those of the thread that trains, and add up to the time of the steps. InputError
    for a trace without the range kinds.STEPS.
    """
    ranges = (event for event in trace.events if event.cat == RANGE)
    steps = next((event for event in ranges if event.name == kinds.STEPS), None)
    if steps is None:
        raise InputError(
            f"profile: the trace has no range {kinds.STEPS!r}, expected one of a whole profile; "
            "record it again"
        )
    kernels = sorted(
        (event for event in trace.events if event.cat in DEVICE and event.ph == "X"),
        key=lambda event: event.ts,
    )
    walk = _Walk(trace, steps, is_of_device=bool(kernels))
    if kernels:
        walk.count_kernels(kernels)
    return Measured(steps.dur, bool(kernels), dict(walk.work))


class _Walk:
    """Walk through the events of a trace in the order of time."""

    def __init__(self, trace: Trace, steps: Event, *, is_of_device: bool) -> None:
        self.work: defaultdict[str, Work] = defaultdict(Work)
        self._steps, self._is_of_device = steps, is_of_device
        self._open: defaultdict[int | str, list[_Open]] = defaultdict(list)  # by thread
        self._kind_at: dict[Begin, _Open] = {}
        self._kind_of_id: dict[int | str, str] = {}
        self._forward = _forward_begins(trace.events)
        self._memory = _Memory(self.work)
        for event in _in_order(trace.events):
            if event.name == MEMORY:
                self._allocate(event)
            else:
                self._enter(event)
        self._memory.end()

    def _enter(self, event: Event) -> None:
        """Find the kind of an operator, and count it where the trained thread is in its steps."""
        outer = self._above(event)
        opened = _opened(event, outer, self._kind_at.get(self._forward.get(_begin(event), ("", 0))))
        self._open[event.tid].append(opened)
        self._kind_at[_begin(event)] = opened
        if event.args.external_id is not None:
            self._kind_of_id[event.args.external_id] = opened.kind
        is_counted = event.tid == self._steps.tid and self._is_within(event)
        if self._is_of_device or not is_counted:
            return
        self.work[opened.kind].time_us += event.dur
        if outer is not None and event is not self._steps:
            self.work[outer.kind].time_us -= event.dur
            self.work[opened.kind].calls += outer.kind != opened.kind

    def _allocate(self, event: Event) -> None:
        on_device = int(event.args.device_type) != 0
        if on_device == self._is_of_device and self._is_within(event):
            outer = self._above(event)
            self._memory.count(event, kinds.OTHER if outer is None else outer.kind)

    def _above(self, event: Event) -> _Open | None:
        """Operator that is open where an event begins; those that are over are closed."""
        stack = self._open[event.tid]
        while stack and stack[-1].event.end <= event.ts:
            stack.pop()
        return stack[-1] if stack else None

    def _is_within(self, event: Event) -> bool:
        return self._steps.ts <= event.ts < self._steps.end

    def count_kernels(self, kernels: Sequence[Event]) -> None:
        """Count the kernels of a device, and the time in which none of them ran."""
        over, busy_us = self._steps.ts, 0.0
        for kernel in kernels:
            if kernel.ts >= self._steps.end:
                continue
            known = self._kind_of_id.get(kernel.args.external_id or "", kinds.OTHER)
            kind = known if known != kinds.OTHER else kinds.kind_of(kernel.name) or kinds.OTHER
            alone_us = max(0.0, min(kernel.end, self._steps.end) - max(kernel.ts, over))
            over, busy_us = max(over, kernel.end), busy_us + alone_us
            self.work[kind].time_us += alone_us
            self.work[kind].calls += 1
        self.work[kinds.IDLE].time_us += self._steps.dur - busy_us


class _Memory:
    """Memory that is allocated by each kind of work, and what is there at the fullest moment."""

    def __init__(self, work: defaultdict[str, Work]) -> None:
        self._work = work
        self._alive: dict[int | str, tuple[str, int]] = {}  # kind and bytes, by address
        self._by_kind: defaultdict[str, int] = defaultdict(int)
        self._total, self._peak = 0, 0

    def count(self, event: Event, kind: str) -> None:
        """Count memory that is taken or given back."""
        n_bytes, address = int(event.args.bytes), event.args.address
        if n_bytes > 0:
            self._alive[address] = kind, n_bytes
            self._work[kind].allocated_bytes += n_bytes
            self._add(kind, n_bytes)
        elif address in self._alive:
            self.end()  # a peak is over once something is given back
            owner, size = self._alive.pop(address)
            self._add(owner, -size)

    def end(self) -> None:
        """Keep what each kind has, if together it is more than ever before."""
        if self._total > self._peak:
            self._peak = self._total
            for kind in self._work.keys() | self._by_kind.keys():
                self._work[kind].peak_bytes = self._by_kind[kind]

    def _add(self, kind: str, n_bytes: int) -> None:
        self._by_kind[kind] += n_bytes
        self._total += n_bytes


def _opened(event: Event, outer: _Open | None, forward: _Open | None) -> _Open:
    """Operator with its kind: that of a range around it or around its forward, its own by name,
    or that of the operator that calls it."""
    own = kinds.kind_of(event.name) if event.cat == OPERATOR else None
    if own == kinds.COMMUNICATION:
        return _Open(event, own, is_range=True)
    if outer is not None and outer.is_range:
        return _Open(event, outer.kind, is_range=True)
    if event.name in kinds.RANGES:
        return _Open(event, kinds.RANGES[event.name], is_range=True)
    if forward is not None and forward.is_range:
        return _Open(event, forward.kind, is_range=True)
    if event.name in kinds.PYTHON:
        return _Open(event, kinds.BETWEEN, is_range=False)
    if own == kinds.ATTENTION:
        return _Open(event, own, is_range=True)
    is_called = outer is not None and outer.event.name not in kinds.PYTHON
    inherited = outer.kind if is_called and outer is not None else kinds.OTHER
    return _Open(event, own or inherited, is_range=False)


def _in_order(events: Sequence[Event]) -> Iterator[Event]:
    """Yield operators and records of memory in the order of time, the calling ones first."""
    chosen = [
        event
        for event in events
        if (event.ph == "X" and event.cat in (OPERATOR, RANGE)) or event.name == MEMORY
    ]
    yield from sorted(chosen, key=lambda event: (event.ts, event.name == MEMORY, -event.dur))


def _forward_begins(events: Sequence[Event]) -> dict[Begin, Begin]:
    """Begin of the operator that each operator of a backward is the gradient of."""
    begins = {event.id: _begin(event) for event in events if event.cat == LINK and event.ph == "s"}
    ends = (event for event in events if event.cat == LINK and event.ph == "f")
    return {_begin(event): begins[event.id] for event in ends if event.id in begins}


def _begin(event: Event) -> Begin:
    return event.tid, event.ts
