"""Training from a direction beside training from the identity: held-out loss by epoch on the bundled persona rows.

    python -m benchmarks.steering.init_from FOLDER [seeds]

Writes docs/images/init-from.png and prints the losses. The direction is found on the rows that are trained on: both
hold out the same fifth of the rows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from rich.console import Console

from reftune.data.persona import load_demo
from reftune.data.splitting import split_rows
from reftune.output.pictures import new_figure, save_figure
from reftune.runs import run_training
from reftune.runs.recipe import TrainRecipe
from reftune.steering.run import steer
from reftune.steering.settings import SteerSettings

LAYER, POSITIONS = 18, "l1+generated"
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "init-from.png"
torch.set_num_threads(1)


def curve(folder: Path, **settings: object) -> list[float]:
    """Held-out loss after each epoch."""
    recipe = TrainRecipe(
        method="loreft", rank=4, layers=LAYER, positions=POSITIONS, batch_size=4, output=str(folder), overwrite=True,
        tensorboard=False, device="cpu", **settings,
    )  # fmt: skip
    run_training(recipe, Console(stderr=True))
    last = max(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    log = json.loads(last.read_text(encoding="utf-8"))["log_history"]
    return [entry["eval_loss"] for entry in log if "eval_loss" in entry]


def main(place: Path, seeds: int) -> None:
    place.mkdir(parents=True, exist_ok=True)
    learnt, held = split_rows(load_demo(), eval_fraction=0.2, seed=0)
    files = {}
    for name, rows in (("train", learnt), ("held", held)):
        files[name] = place / f"{name}.jsonl"
        made = [{"prompt": row.messages[-1].content, "completion": row.completion} for row in rows]
        files[name].write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    direction = place / "direction"
    found = steer(
        str(files["train"]),
        SteerSettings(output=str(direction), layers=LAYER, positions=POSITIONS, device="cpu"),
        Console(stderr=True),
    ).found
    print(f"layer {LAYER}, strength {found['strength']:.3g}, {len(learnt)} rows, {len(held)} held out")
    shared = {"train_file": str(files["train"]), "eval_file": str(files["held"])}
    runs = {
        "identity, 3 epochs": {},
        "direction, 3 epochs": {"init_from": str(direction)},
        "direction, 2 epochs": {"init_from": str(direction), "epochs": 2},
    }
    figure, axes = new_figure((5.5, 3.4))
    for colour, (name, settings) in zip(("#64748b", "#b45309", "#f59e0b"), runs.items(), strict=True):
        curves = [curve(place / f"{name}-{seed}", seed=seed, **shared, **settings) for seed in range(seeds)]
        means = [sum(at) / seeds for at in zip(*curves, strict=True)]
        print(f"{name}: {', '.join(f'{loss:.4f}' for loss in means)}; by seed {curves}")
        axes.plot(range(1, len(means) + 1), means, marker="o", color=colour, label=f"from the {name}")
    axes.set(xlabel="epoch", ylabel="held-out loss (nats a token)", xticks=[1, 2, 3])
    axes.legend(frameon=False)
    save_figure(figure, PICTURE)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2)
