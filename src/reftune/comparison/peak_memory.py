"""The most memory that one run took, beyond what the process held before its model was loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import torch

from reftune.training.throughput import peak_memory_bytes

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Starts measuring when made: before the model is loaded, in a process of the run's own.

    On CUDA it is the most memory that tensors were allocated. On the CPU it is the high-water mark of resident memory
    less what was resident at the start (the libraries). The kernel's mark of a process forked from a large one is the
    parent's, so it is reset first, which Linux alone offers.

    Args:
        own_process: whether nothing else ran here; a mark shared with other runs says nothing on the CPU.
    """

    def __init__(self, own_process: bool) -> None:
        self._own_process = own_process
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if sys.platform == "linux":
            try:
                _RESET.write_text("5")
            except OSError:  # a container may not allow it
                pass
        self._before = int(psutil.Process().memory_info().rss)

    def bytes(self) -> int | None:
        """The peak so far, or None where it cannot be told."""
        if torch.cuda.is_available():
            return peak_memory_bytes()
        if not self._own_process:
            return None
        return max(0, (_high_water_mark() or peak_memory_bytes()) - self._before)


def _high_water_mark() -> int | None:
    if sys.platform != "linux":
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
