"""Memory of this process and of this machine, in bytes, on Linux, macOS and Windows."""

import ctypes
import os
import re
import sys
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")


class _ProcessMemoryCounters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of Windows' psapi.h."""

    _fields_ = (
        ("cb", ctypes.c_uint32),
        ("PageFaultCount", ctypes.c_uint32),
        ("PeakWorkingSetSize", ctypes.c_size_t),
        ("WorkingSetSize", ctypes.c_size_t),
        ("QuotaPeakPagedPoolUsage", ctypes.c_size_t),
        ("QuotaPagedPoolUsage", ctypes.c_size_t),
        ("QuotaPeakNonPagedPoolUsage", ctypes.c_size_t),
        ("QuotaNonPagedPoolUsage", ctypes.c_size_t),
        ("PagefileUsage", ctypes.c_size_t),
        ("PeakPagefileUsage", ctypes.c_size_t),
    )


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of Windows' sysinfoapi.h."""

    _fields_ = (
        ("dwLength", ctypes.c_uint32),
        ("dwMemoryLoad", ctypes.c_uint32),
        ("ullTotalPhys", ctypes.c_uint64),
        ("ullAvailPhys", ctypes.c_uint64),
        ("ullTotalPageFile", ctypes.c_uint64),
        ("ullAvailPageFile", ctypes.c_uint64),
        ("ullTotalVirtual", ctypes.c_uint64),
        ("ullAvailVirtual", ctypes.c_uint64),
        ("ullAvailExtendedVirtual", ctypes.c_uint64),
    )


def peak_bytes() -> int:
    """Most physical memory that this process has had at once, in bytes; OSError if the system does
    not say.
    """
    if sys.platform == "win32":
        counters = _ProcessMemoryCounters(cb=ctypes.sizeof(_ProcessMemoryCounters))
        current = _dll("kernel32").GetCurrentProcess
        current.restype = ctypes.c_void_p
        ask = _dll("psapi").GetProcessMemoryInfo
        ask.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32)
        if not ask(current(), ctypes.addressof(counters), counters.cb):
            raise OSError("GetProcessMemoryInfo failed")
        return counters.PeakWorkingSetSize
    if sys.platform == "linux" and (peak := _peak_of_linux()) is not None:
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def _peak_of_linux() -> int | None:
    """VmHWM of /proc in bytes, where there is one: unlike ru_maxrss it does not begin with what the
    parent had at the fork.
    """
    try:
        line = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return None if line is None else int(line[1]) * 1024


def total_bytes() -> int:
    """Physical memory of this machine, in bytes; OSError if the system does not say."""
    if sys.platform == "win32":
        status = _MemoryStatus(dwLength=ctypes.sizeof(_MemoryStatus))
        ask = _dll("kernel32").GlobalMemoryStatusEx
        ask.argtypes = (ctypes.c_void_p,)
        if not ask(ctypes.addressof(status)):
            raise OSError("GlobalMemoryStatusEx failed")
        return status.ullTotalPhys
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _dll(name: str) -> Any:
    """Library of Windows."""
    return ctypes.WinDLL(name)  # pyright: ignore[reportAttributeAccessIssue]
