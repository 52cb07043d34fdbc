"""pyreft's six interventions: this library's edits, under pyreft's names and with its constructor's arguments."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from reftune.edits import ConsreftEdit, DireftEdit, DireftOrthogonalEdit, LobireftEdit, LoreftEdit, NoreftEdit

logger = logging.getLogger(__name__)


class _PyreftArguments:
    """Translates pyreft's constructor: mixed in before an edit.

    Args:
        embed_dim: width of the hidden state.
        low_rank_dimension: rank.
        dropout: probability of dropping an element of the edit (pyreft: of the whole edited state, in evaluation too).
        act_fn: activation, by its transformers name; None or ``"linear"`` for none.
        add_bias: a bias in the projection, where the intervention has that option.
        init: ``"paper"`` starts as pyreft does, ``"identity"`` starts as the base model.
        parametrization: ``"cholesky"``, or ``"householder"`` for pyreft's training curve.
        dtype: accepted and not needed: parameters are float32 whatever the model's dtype.
        **other: pyvene's settings, which have no meaning here.
    """

    method: str
    keep_last_dim = True

    def __init__(
        self,
        embed_dim: int,
        low_rank_dimension: int,
        dropout: float = 0.0,
        act_fn: str | None = None,
        add_bias: bool = False,
        init: str = "paper",
        parametrization: str = "cholesky",
        dtype: Any = None,
        **other: Any,
    ) -> None:
        given: dict[str, Any] = {
            "dropout": dropout,
            "act_fn": act_fn,
            "add_bias": bool(add_bias),
            "init": init,
            "parametrization": parametrization,
        }
        edit: Any = next(c for c in type(self).__mro__ if c.__module__.startswith("reftune.edits"))
        taken = inspect.signature(edit.__init__).parameters
        if other:
            logger.info("%s leaves %s aside", type(self).__name__, ", ".join(other))
        options = {name: value for name, value in given.items() if name in taken}
        super().__init__(embed_dim, low_rank_dimension, **options)  # pyright: ignore[reportCallIssue]

    @property
    def embed_dim(self) -> int:
        """Width of the hidden state."""
        return self.width  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def low_rank_dimension(self) -> int:
        """Rank."""
        return self.r  # pyright: ignore[reportAttributeAccessIssue]


class LoreftIntervention(_PyreftArguments, LoreftEdit):
    """h + R^T(a(Wh + b) - Rh): LoReFT."""

    method = "loreft"


class NoreftIntervention(_PyreftArguments, NoreftEdit):
    """h + P^T(a(Wh + b) - Ph - c): LoReFT without orthonormal rows; c only with ``add_bias``."""

    method = "noreft"


class ConsreftIntervention(_PyreftArguments, ConsreftEdit):
    """h + R^T(b - Rh): a constant in r directions."""

    method = "consreft"


class LobireftIntervention(_PyreftArguments, LobireftEdit):
    """h + R^T b: a low-rank bias."""

    method = "lobireft"


class DireftIntervention(_PyreftArguments, DireftOrthogonalEdit):
    """h + R^T a(Wh + b): pyreft's Direft, an ablation with an orthonormal projection."""

    method = "direft_orthogonal"


class NodireftIntervention(_PyreftArguments, DireftEdit):
    """h + P^T a(Wh + b): the paper's DiReFT, which pyreft calls Nodireft."""

    method = "direft"


INTERVENTIONS: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        LoreftIntervention,
        NoreftIntervention,
        ConsreftIntervention,
        LobireftIntervention,
        DireftIntervention,
        NodireftIntervention,
    )
}
"""The interventions by pyreft's class names, as its checkpoints record them."""

BY_METHOD: dict[str, type[Any]] = {cls.method: cls for cls in INTERVENTIONS.values()}
"""The interventions by this library's method names, as our checkpoints record them."""
