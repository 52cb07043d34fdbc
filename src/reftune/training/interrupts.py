"""Ctrl-C or SIGTERM in training: stop where a resumed run can take up exactly, with the state saved.

The first one lets the step that is running finish (and the evaluation that belongs to it), saves, and then raises
`KeyboardInterrupt`. A second one stops at once and saves nothing. A `KeyboardInterrupt` from elsewhere (a callback, a
notebook's stop button in another thread) finds here whether the state belongs together, and the random state to save.

Of several processes one may be told a step before the others: they agree after each step, and stop at the same one.
"""

from __future__ import annotations

import logging
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState

from reftune.output.interrupt import interrupt

logger = logging.getLogger(__name__)


@dataclass
class RandomState:
    """The random generators that training draws from, at one moment."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        """Read them all."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(random.getstate(), np.random.get_state(), torch.random.get_rng_state(), cuda)

    def restore(self) -> None:
        """Set them all; **changes the process's global generators**."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.random.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


class InterruptCallback(TrainerCallback):
    """Knows whether someone pressed Ctrl-C, and whether the model is between two updates.

    Attributes:
        asked: Ctrl-C was pressed and the run will stop at the next point that can be resumed from.
        hurried: it was pressed twice.
        alone: no other process takes part in the training.
    """

    def __init__(self) -> None:
        self.asked = False
        self.hurried = False
        self.alone = True
        self._among: Any = None  # the group of several processes; on the CPU, so that no GPU is waited for
        self._updating: int | None = None  # the step whose update began last
        self._point: tuple[int, RandomState] | None = None  # the last point that a resumed run could start from

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle Ctrl-C and SIGTERM while the context lasts. **Replaces the default handlers, and puts them back**.

        A handler that the program installed itself is left alone, and so is every thread but the main one.
        """
        self.asked = self.hurried = False
        self._updating = self._point = None
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        plain = (signal.default_int_handler, signal.SIG_DFL, interrupt)
        ours = {number: found for number, found in before.items() if found in plain}
        for number in ours:
            signal.signal(number, self._pressed)
        self.alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        self._among = None if self.alone else dist.new_group(backend="gloo")
        try:
            yield
        finally:
            for number, found in ours.items():
                signal.signal(number, found)
            if self._among is not None:
                dist.destroy_process_group(self._among)

    def _pressed(self, signum: int, frame: Any) -> None:
        if self.asked:
            self.hurried = True
            raise KeyboardInterrupt
        self.asked = True
        what = "SIGTERM" if signum == signal.SIGTERM else "Ctrl-C"
        logger.warning("%s: finishing this step, then saving a checkpoint; a second one stops at once, unsaved.", what)

    def _stops(self) -> bool:
        """Whether any process was asked to stop; every process must call it."""
        if self._among is None:
            return self.asked
        asked = torch.tensor(int(self.asked))
        dist.all_reduce(asked, dist.ReduceOp.MAX, self._among)
        return bool(asked)

    def can_save(self, step: int) -> bool:
        """Whether weights, optimiser and ``step`` (the steps done) belong together: not in the middle of an update."""
        return not self.hurried and self._updating != step

    def back_to_step(self, step: int) -> None:
        """Take the random state back to where a run resumed after ``step`` begins; **changes the generators**."""
        if self._point is not None and self._point[0] == step:
            self._point[1].restore()

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before the rows are shuffled: where a run that resumes between two epochs starts."""
        self._point = (state.global_step, RandomState.now())

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """From here to the end of the step the state is between two."""
        self._updating = state.global_step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A step is done; after Ctrl-C it is saved, the last of an epoch only once the epoch's end is through."""
        self._point = (state.global_step, RandomState.now())
        if self._stops() and not float(state.epoch).is_integer():
            control.should_save = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The epoch's own evaluation comes first, so that a resumed run need not repeat it."""
        if self._stops():
            control.should_save = True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The state that Ctrl-C asked for is on disk.

        Raises:
            KeyboardInterrupt: to end the training.
        """
        if self._stops():
            raise KeyboardInterrupt
