"""A number for each layer and position, and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from reftune.output.pictures import new_figure, save_figure

_INK = "#1f2937"


@dataclass(frozen=True)
class HeatMap:
    """A number for each layer and position (or head).

    Attributes:
        values: averaged over the batch.
        rows: names of the layers.
        columns: names of the positions or heads.
        per_row: the values of each row of the batch.
        title: what is shown.
        across: what the columns are.
    """

    values: Float[Tensor, "layers columns"]
    rows: list[str]
    columns: list[str]
    per_row: Float[Tensor, "layers columns batch"]
    title: str = ""
    across: str = "position"

    @classmethod
    def of(
        cls, per_row: Tensor, layers: Sequence[int], columns: Sequence[Any], title: str, across: str = "position"
    ) -> HeatMap:
        """The map of values (layers, columns, batch), averaged over the batch."""
        return cls(per_row.mean(-1), list(map(str, layers)), list(map(str, columns)), per_row, title, across)

    def best(self) -> tuple[str, str, float]:
        """The layer and column with the greatest value, and that value."""
        layer, column = divmod(int(self.values.argmax()), self.values.shape[1])
        return self.rows[layer], self.columns[column], float(self.values[layer, column])

    def limits(self, *others: HeatMap) -> tuple[float, float]:
        """The values at the ends of the colours, for this map or for it and others that are compared with it.

        The least and the greatest of all, or as far below zero as above where values have both signs.
        """
        least = min(float(one.values.min()) for one in (self, *others))
        greatest = max(float(one.values.max()) for one in (self, *others))
        bound = max(abs(least), abs(greatest))
        return (-bound, bound) if least < -0.05 * max(greatest, 1e-9) else (least, greatest)

    def plot(self, path: str | Path, limits: tuple[float, float] | None = None) -> None:
        """Draw it into a PNG, **which is replaced**; `limits` as in `plot_heat_map`."""
        plot_heat_map(self, path, limits=limits)

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        picture = BytesIO()
        _drawn(self, self.title, self.limits()).savefig(picture, format="png")
        return picture.getvalue()


def plot_heat_map(
    heat_map: HeatMap, path: str | Path, title: str | None = None, limits: tuple[float, float] | None = None
) -> None:
    """Draw a heat map, layers upwards as the computation goes; **replaces the file**.

    Args:
        heat_map: the values and names.
        path: a PNG; its folder is made.
        title: in place of the map's own.
        limits: the values at the ends of the colours; None: the map's own. Pictures that are compared need the same,
            ``first.limits(second)``.
    """
    save_figure(_drawn(heat_map, heat_map.title if title is None else title, limits or heat_map.limits()), path)


def _drawn(heat_map: HeatMap, title: str, limits: tuple[float, float]) -> Figure:
    values = heat_map.values.float().numpy()
    height, width = values.shape
    size = min(14.0, max(4.2, 2.6 + 0.62 * width)), min(7.5, max(2.4, 1.4 + 0.3 * height))
    figure, axes = new_figure(size)
    both = -limits[1] == limits[0] < 0
    image = axes.imshow(
        values, aspect="auto", origin="lower", cmap="RdBu_r" if both else "viridis", vmin=limits[0], vmax=limits[1]
    )
    fits = max(map(len, heat_map.columns)) * 0.085 < (size[0] - 1.8) / width
    axes.set_xticks(range(width), heat_map.columns, rotation=0 if fits else 40)
    for label in axes.get_xticklabels() if not fits else []:
        label.set_ha("right")
        label.set_rotation_mode("anchor")
    axes.set_xlabel(heat_map.across)
    step = max(1, height // 12)
    axes.set_yticks(range(0, height, step), heat_map.rows[::step])
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=10)
    if height * width <= 72:
        middle = sum(limits) / 2
        for row in range(height):
            for column in range(width):
                value = float(values[row, column])
                pale = abs(value) < 0.55 * limits[1] if both else value > middle
                ink = _INK if pale else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
    figure.colorbar(image, ax=axes, label=f"{limits[0]:.2g} to {limits[1]:.2g}")
    return figure
