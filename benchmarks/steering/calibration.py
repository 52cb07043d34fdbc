"""How far a calibrated strength is off on rows that did not find it, beside the standard error that steer prints.

`python -m benchmarks.steering.calibration` takes the bundled pirate's direction at two layers and the 160 neutral
answers, or those of `--neutral-file`. A strength found on half of them is tried on the other half, over 2,000 random
halves.
"""

from __future__ import annotations

import argparse

import numpy as np

from reftune import models
from reftune.data.persona import load_demo, neutral_rows
from reftune.data.tokenising import Encoding
from reftune.engine.position_grammar import parse_positions
from reftune.engine.sites import find_sites
from reftune.steering.directions import find_directions
from reftune.steering.states import mean_states
from reftune.steering.strength import Effect, Neutral, steered

ASKED = (0.05, 0.3, 1.0)
LAYERS = (12, 24)
POSITIONS = "l1+generated"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neutral-file", help="prompts with plain answers (default: the package's 160)")
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--kl", type=float, nargs="+", default=ASKED, metavar="NATS-A-TOKEN")
    options = parser.parse_args()
    model, tokenizer = models.load("smollm2", device="cpu")
    model.requires_grad_(False)
    encoding, pad = Encoding(tokenizer), int(tokenizer.pad_token_id)
    pirate, plain, many = (
        encoding.dataset(rows).to_list()
        for rows in (load_demo(), neutral_rows(), neutral_rows(options.neutral_file, many=True))
    )
    sites = find_sites(model, "block_output", list(options.layers))
    with mean_states(model, [*pirate, *plain], sites, parse_positions(POSITIONS), pad, 8) as states:
        directions = {
            site: find_directions(states[: len(pirate), place], states[len(pirate) :, place])
            for place, site in enumerate(sites)
        }
    print(
        "| layer | asked | strength | measured there | standard error | error on the other half | expected of halves |"
    )
    print("|---|---|---|---|---|---|---|")
    for site, direction in directions.items():
        with steered(model, {site: direction}, POSITIONS, rows=many) as on:
            neutral = Neutral(model, many, pad, 8)
            for asked in options.kl:
                found, _ = neutral.calibrated(on, asked, 1.0)
                measured = neutral.effect(on, found.strength)
                error = (found.told[1] or 0) / asked
                print(
                    f"| {site.layer} | {asked:g} | {found.strength:.3f} | {measured.kl_of():.4f} | {error:.1%} "
                    f"| {_crossed(found):.1%} | {2 * error:.1%} |",
                    flush=True,
                )


def _crossed(found: Effect, halves: int = 2000) -> float:
    """Root mean square of the relative error on half of the rows, at the strength found on the other half."""
    draw, errors, count = np.random.default_rng(0), [], len(found.tokens)
    for _ in range(halves):
        order = draw.permutation(count)
        one, other = (
            found.kl[half].sum() / found.tokens[half].sum() for half in (order[: count // 2], order[count // 2 :])
        )
        errors.append(other / one - 1)
    return float(np.sqrt(np.mean(np.square(errors))))


if __name__ == "__main__":
    main()
