"""The loss picture."""

import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from reftune.training.plots import plot_loss

HISTORY: list[dict[str, Any]] = [
    *({"step": step, "loss": 3.0 * math.exp(-step / 30) + 0.4} for step in range(1, 101, 2)),
    *({"step": step, "eval_loss": 3.1 * math.exp(-step / 30) + 0.5 + step / 400} for step in range(20, 101, 20)),
    {"step": 3, "loss": float("nan")},
    {"step": 100, "train_loss": 0.7},
]


def test_both_curves_are_drawn(tmp_path: Path, monkeypatch: Any) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        drawn.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    plot_loss(HISTORY, tmp_path / "made" / "loss.png")
    lines = {line.get_label(): line for line in drawn[0].axes[0].get_lines()}
    assert set(lines) == {"train", "eval"}
    assert len(lines["train"].get_xdata()) == 49, "a loss that is not a number is left out"  # type: ignore[arg-type]
    assert list(lines["eval"].get_xdata()) == [20, 40, 60, 80, 100]  # type: ignore[call-overload]


def test_the_file_is_a_png_and_nothing_else_is_left(tmp_path: Path) -> None:
    target = tmp_path / "loss.png"
    plot_loss(HISTORY, target)
    plot_loss([], target)
    assert target.read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in tmp_path.iterdir()] == ["loss.png"]


def test_a_failed_drawing_leaves_the_earlier_picture(tmp_path: Path, monkeypatch: Any) -> None:
    target = tmp_path / "loss.png"
    plot_loss(HISTORY, target)
    before = target.read_bytes()

    def fail(self: Figure, path: Path, **kwargs: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError):
        plot_loss(HISTORY, target)
    assert target.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["loss.png"]
