"""What one forward edits: made once a forward from its token layout, and handed down to every site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reftune.engine.position_grammar import Positions
from reftune.engine.positions import Part, TokenLayout, whole_rows
from reftune.errors import ReftuneError

Mask = Tensor | Mapping[str, Tensor] | None
"""A caller's ``intervention_mask``: one for every adapter, or one for each by name."""

EVERY_ROW = "every row"
Rows = Tensor | Literal["every row"] | None
"""Flat token indices; under ``torch.compile``, whose graphs have no data-dependent shapes, a bool for each token."""


class PositionPlan:
    """What one forward edits: immutable, made once a forward and handed down to every site.

    Rows are indices into the tokens of the hidden state flattened to (batch * sequence, hidden), so that sites whose
    tensors a model reshapes (OPT, mixtures of experts) read them alike. They are found once for each distinct position
    and reused by every layer.

    Args:
        layout: the forward's tokens; None where the model has no token input (images), then read from the hidden state.
        mask: a caller's ``intervention_mask`` (batch, sequence), which replaces every adapter's positions; or a mapping
            from adapter names to masks, which replace those adapters' positions.
        keep_empty: give an empty index rather than None where no row is edited (so that in training every edit takes
            part in the graph, as distributed training wants it).
        row_adapters: in a batch of mixed adapters, the name of each row's adapter.
        directions: which of an edit's r directions act on each row of the batch, (batch, r), by adapter.

    Attributes:
        adapters: the adapters that edited when the forward began; None: any.
    """

    adapters: tuple[str, ...] | None = None

    def __init__(
        self,
        layout: TokenLayout | None,
        mask: Mask = None,
        keep_empty: bool = False,
        row_adapters: Sequence[str] | None = None,
        directions: Mapping[str, Tensor] | None = None,
    ):
        self._layout = layout
        self._mask = mask
        self._directions = directions or {}
        self._keep_empty = keep_empty
        self.row_adapters = row_adapters
        self._rows: dict[tuple[str, Part, str | None, torch.device, torch.Size], Rows] = {}

    def rows(self, positions: Positions, part: Part, hidden: Tensor, adapter: str = "default") -> Rows:
        """Flat token indices to edit, ``EVERY_ROW`` when that is all of them, None when there are none (see ``Rows``).

        Args:
            positions: an edit's positions.
            part: ``"both"``, or the half of an untied pair.
            hidden: the tensor about to be edited, (..., hidden), with batch * sequence rows.
            adapter: the edit's adapter, which matters in a batch of mixed adapters.

        Raises:
            ReftuneError: the tensor does not hold this forward's tokens.
        """
        by_name = self.row_adapters or isinstance(self._mask, Mapping) or isinstance(self, PastPrompt)
        key = (positions.text, part, adapter if by_name else None, hidden.device, hidden.shape[:-1])
        if key not in self._rows:
            self._rows[key] = self._find(positions, part, hidden, adapter)
        return self._rows[key]

    def directions(self, rows: Rows, hidden: Tensor, adapter: str) -> Float[Tensor, "rows r"] | None:
        """Which directions act on each of these rows (1 or 0), or None where all do on every row.

        Args:
            rows: what ``rows`` returned.
            hidden: the same tensor as there.
            adapter: the edit's adapter.
        """
        wanted = self._directions.get(adapter)
        if wanted is None:
            return None
        tokens = hidden.numel() // hidden.shape[-1]
        if isinstance(rows, Tensor) and rows.dtype != torch.bool:
            found = rows
        else:
            found = torch.arange(tokens, device=hidden.device)
        return wanted.to(hidden.device)[found // (tokens // wanted.shape[0])].float()

    def _find(self, positions: Positions, part: Part, hidden: Tensor, adapter: str) -> Rows:
        given = self._mask.get(adapter) if isinstance(self._mask, Mapping) else self._mask
        tokens = hidden.numel() // hidden.shape[-1]
        layout = self._layout
        if layout is None or (positions.everywhere and layout.attended.numel() != tokens):  # states other than tokens
            if given is None and hidden.ndim < 3 and not positions.everywhere:
                raise ReftuneError(
                    f"positions={positions.text!r}: states of shape {tuple(hidden.shape)} are no tokens in an order. "
                    "Use positions='all', or pass an intervention_mask (batch,)."
                )
            batch = hidden.shape[0] if hidden.ndim > 1 else 1  # a vector by itself is one state
            layout = whole_rows(batch, tokens // max(1, batch), hidden.device)
        selected = layout.selected(positions, part) if given is None else given.reshape(*given.shape[:1] or (1,), -1)
        if selected.numel() != tokens:
            what = "intervention_mask has shape" if given is not None else "This forward has tokens of shape"
            shape = tuple(given.shape if given is not None else selected.shape)
            raise ReftuneError(
                f"{what} {shape} but the edited tensor holds {tokens} states: the model changes the sequence between "
                f"its input and this site. Pass an intervention_mask with one value for each state there."
            )
        if self.row_adapters:
            own = rows_of(self.row_adapters, adapter, selected.shape[0], selected.device)
            selected = selected & own.unsqueeze(-1)
        if torch.compiler.is_compiling():
            return selected.flatten().to(hidden.device)
        rows = selected.flatten().nonzero().squeeze(-1).to(hidden.device)
        if len(rows) == tokens:
            return EVERY_ROW
        return rows if len(rows) or self._keep_empty else None


def rows_of(
    row_adapters: Sequence[str | None], adapter: str | None, batch: int, device: torch.device
) -> Bool[Tensor, " batch"]:
    """Which rows of a batch are an adapter's; names are repeated for beams and return sequences."""
    named = len(row_adapters)
    if batch % named:
        raise ReftuneError(f"adapter_names has {named} names for {batch} rows: give one name a row.")
    own = torch.tensor([name == adapter for name in row_adapters], device=device)
    return own.repeat_interleave(batch // named)


class PastPrompt(PositionPlan):
    """The plan of a forward of generated tokens alone, for which nothing needs to be read: every one, or none.

    Args:
        batch: rows of the forward.
        masked: adapters whose positions a mask over the prompt replaces, so that they edit nothing after it.
        row_adapters: as for ``PositionPlan``.
        directions: as for ``PositionPlan``.
    """

    def __init__(
        self,
        batch: int,
        masked: Sequence[str],
        row_adapters: Sequence[str] | None = None,
        directions: Mapping[str, Tensor] | None = None,
    ):
        super().__init__(None, None, False, row_adapters, directions)
        self._batch = batch
        self._masked = tuple(masked)

    def _find(self, positions: Positions, part: Part, hidden: Tensor, adapter: str) -> Rows:
        if not positions.generated or part == "prefix" or adapter in self._masked:
            return None
        if not self.row_adapters:
            return EVERY_ROW
        tokens = hidden.numel() // hidden.shape[-1] // self._batch
        own = rows_of(self.row_adapters, adapter, self._batch, hidden.device).repeat_interleave(tokens)
        return own if torch.compiler.is_compiling() else own.nonzero().squeeze(-1)


NOTHING: PositionPlan | None = None  # the plan of a decode step: sites return at once
