"""Prefix reuse as the trainer asks for it: when it is on, and what it says when it is not."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from reftune.errors import ReftuneError
from reftune.training.prefix.reuse import OtherBatch, PrefixReuse, PrefixReuseOff, Reduced
from reftune.training.prefix.row_groups import one_more_forward, plain_groups
from reftune.training.prefix.store import GIB, PrefixStore
from reftune.training.supervised_logits import SupervisedLogits, joined, plain_model, supervised_forward

logger = logging.getLogger(__name__)


class PrefixSwitch:
    """Prefix reuse as the trainer asks for it: on where it is exact and useful, else off, with one logged reason.

    Args:
        mode: ``"auto"``, ``"on"`` (being off is then an error) or ``"off"``.
        cache_gib: budget of host memory in GiB; None: a quarter of what is free.
        datasets: the tokenised rows that will come, for what they all begin with.
        disk: whether memory-mapped files take what memory does not.
        store: what earlier trainings stored and later ones may use, kept open here; its own budget holds, and the two
            arguments above have no meaning then. None: a store of this training's own.
        alone: compute what is constant of each row by itself: slower, and bit for bit the same in any company.

    Attributes:
        status: ``"on"``, or ``"off"`` with the reason.
    """

    def __init__(
        self,
        mode: str,
        cache_gib: float | None,
        datasets: list[Any],
        disk: bool = True,
        store: PrefixStore | None = None,
        alone: bool = False,
    ) -> None:
        if mode not in ("auto", "on", "off"):
            raise ReftuneError(f"prefix_reuse={mode!r}: must be one of auto, on, off.")
        if cache_gib is not None and cache_gib < 0:
            raise ReftuneError(f"prefix_cache_gib={cache_gib}: give a size in GiB of at least 0, or leave it out.")
        self.mode = mode
        self.status = "off: asked for" if mode == "off" else "on"
        self._bytes = None if cache_gib is None else int(cache_gib * GIB)
        self._disk_bytes = None if disk else 0
        self._datasets = [rows for rows in datasets if rows is not None]
        self._reuse: PrefixReuse | None = None
        self._shared_store, self._alone = store, alone
        self._counted_before = store.counts() if store is not None else {}

    def forward(self, model: nn.Module, inputs: dict[str, Any]) -> SupervisedLogits:
        """The supervised logits of a batch, computed with as little work as is exact.

        Args:
            model: a causal language model as the trainer calls it.
            inputs: its batch, with ``labels``.

        Raises:
            ReftuneError: ``mode`` is ``"on"`` and prefix reuse is not possible.
            SupervisedLogitsError: as ``supervised_forward``.
        """
        reduced = self._try(model, inputs)
        if reduced is not None:
            found = []
            for part in reduced:
                with part.running() as arguments:
                    found.append(supervised_forward(model, arguments))
            return joined(found, [part.members for part in reduced])
        device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
        groups = plain_groups(inputs, one_more_forward(plain_model(model), device))
        return joined([supervised_forward(model, part) for _, part in groups], [members for members, _ in groups])

    def _try(self, model: nn.Module, inputs: dict[str, Any]) -> list[Reduced] | None:
        if self.status != "on":
            return None
        try:
            if self._reuse is None:
                self._reuse = self._begin(model)
            return self._reuse.prepare(model, inputs)
        except OtherBatch:
            return None
        except PrefixReuseOff as reason:
            self.switch_off(str(reason))
            return None

    def _begin(self, model: nn.Module) -> PrefixReuse:
        if self._shared_store is not None:
            reuse = PrefixReuse(model, self._shared_store, others_use_it=True, alone=self._alone)
        else:
            reuse = PrefixReuse(model, PrefixStore(self._bytes, self._disk_bytes), alone=self._alone)
        reuse.share_beginning_of(lambda: (row for dataset in self._datasets for row in dataset))
        return reuse

    def switch_off(self, reason: str) -> None:
        """Go on without.

        Raises:
            ReftuneError: ``mode`` is ``"on"``.
        """
        if self.mode == "on":
            raise ReftuneError(f"prefix_reuse='on' is not possible: {reason}. Use 'auto' to train without it.")
        if self.status == "on":
            logger.info("Prefix reuse is off: %s.", reason)
        self.status = f"off: {reason}"
        self.close()

    def next_pass(self) -> None:
        """Begin another epoch."""
        if self._reuse is not None:
            self._reuse.constant.store.next_pass()

    def close(self) -> None:
        """Give memory and files back, those of a shared store excepted."""
        if self._reuse is not None and self._shared_store is None:
            self._reuse.constant.store.close()
        self._reuse = None

    def summary(self) -> dict[str, int]:
        """What the store holds, and what this training asked of it, for a report."""
        if self._reuse is None:
            return {}
        found = self._reuse.constant.store.summary()
        return found | {name: found[name] - before for name, before in self._counted_before.items()}
