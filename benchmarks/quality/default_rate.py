"""The measurements behind `lr: auto` (docs/decisions/0015-defaults-that-are-the-best-known.md).

    python -m benchmarks.quality.default_rate widths [--rank 1 8 64]
    python -m benchmarks.quality.default_rate TASK FOLDER [--rate 2.5e-3 ...] [--rank 8] [--batch-size 8]

``widths``: random Llamas of several widths and depths are taught one answer in 60 steps, with rates a factor of two
apart; prints the mean loss of the last ten. A task of benchmarks/quality (see `tasks.py` for its data): held-out loss
at each rate; without rates, at the default one. Edits are DiReFT, rank 1, `l1+generated`, on all layers, unless flags
say otherwise.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import reftune
from benchmarks.quality.rates import shared_settings
from benchmarks.quality.tasks import TASKS, Rows, write_rows
from reftune.comparison import resolve_comparison, run_comparison, summarise

EDIT: dict[str, Any] = {"method": "direft", "positions": "l1+generated", "layers": "all", "rank": 1}
SHAPES = ((64, 4), (256, 1), (256, 4), (256, 16), (1024, 4))
RATES = [1e-3 * 2**power for power in range(8)]
STEPS, ROWS, PROMPT, ANSWER = 60, 8, 8, 12


def taught(width: int, layers: int, edit: reftune.ReftConfig, rate: float) -> float:
    """Mean loss (nats a token) of the last ten steps."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "vocab_size": 256,
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0, bos_token_id=None, eos_token_id=2)).eval()
    model: Any = get_peft_model(base, edit)
    drawn = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 256, (64, PROMPT), generator=drawn)
    answer = torch.randint(3, 256, (ANSWER,), generator=drawn)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        optimiser.param_groups[0]["lr"] = rate * (1 - step / STEPS)
        chosen = prompts[torch.randperm(len(prompts), generator=drawn)[:ROWS]]
        tokens = torch.cat([chosen, answer.expand(ROWS, -1)], dim=1)
        labels = tokens.clone()
        labels[:, :PROMPT] = -100
        loss = model(input_ids=tokens, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["widths", *TASKS])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("default-rate"))
    parser.add_argument("--rate", type=float, nargs="*", default=[])
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--method", default=EDIT["method"])
    parser.add_argument("--positions", default=EDIT["positions"])
    parser.add_argument("--rank", type=int, nargs="*", default=[EDIT["rank"]])
    options = parser.parse_args()
    if options.what == "widths":
        for width, layers in SHAPES:
            for rank in options.rank:
                config = reftune.ReftConfig(
                    method=options.method,
                    r=rank,
                    layers_to_transform="all",
                    positions=options.positions,
                    task_type="CAUSAL_LM",
                )
                found = {f"{rate:.1e}": round(taught(width, layers, config, rate), 3) for rate in RATES}
                print(f"width {width}, {layers} layers, rank {rank}: {found}", flush=True)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    edits = [EDIT | {"method": options.method, "positions": options.positions, "rank": rank} for rank in options.rank]
    task, rows = TASKS[options.what], Rows.of(TASKS[options.what])
    settings = {
        **shared_settings(task, rows, options.folder),
        "eval_file": write_rows(rows.held_out, options.folder / f"{task.name}-held-out.jsonl"),
        "seeds": [0],
        "output": str(options.folder / task.name),
        "methods": {
            f"rank {edit['rank']}, rate {rate:g}" if rate else f"rank {edit['rank']}, auto": edit
            | ({"lr": rate} if rate else {})
            for edit in edits
            for rate in options.rate or [None]
        },
        **({"batch_size": options.batch_size} if options.batch_size else {}),
    }
    for summary in summarise(run_comparison(resolve_comparison(settings), own_processes=False)):
        print(f"{task.name}, {options.method}, {summary.name}: {summary.loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
