"""Hidden states in one pass against transformers' own, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reftune.engine.position_grammar import parse_positions
from reftune.engine.sites import find_sites
from reftune.steering.states import edited_tokens, mean_states
from tests.tiny_models import CAUSAL


def rows_of(lengths: list[tuple[int, int]], begin: list[int] | None = None) -> list[dict[str, object]]:
    """Rows of these prompts and totals behind the tokens that all begin with."""
    draw, begin = torch.Generator().manual_seed(0), begin or []
    return [
        {
            "input_ids": begin + torch.randint(3, 90, (total,), generator=draw).tolist(), "labels": [],
            "prompt_length": len(begin) + prompt,
        }
        for prompt, total in lengths
    ]  # fmt: skip


@pytest.mark.parametrize("positions", ["l1", "f2+l1", "l1+generated", "generated", "prompt", "all"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_means_over_the_edited_tokens_are_those_of_a_forward_of_each_row(name: str, positions: str) -> None:
    means_are_those_of_a_forward_of_each_row(name, positions, [])


@pytest.mark.parametrize("name", CAUSAL)
def test_what_all_rows_begin_with_is_run_once_and_the_means_are_the_same(name: str) -> None:
    runs = means_are_those_of_a_forward_of_each_row(name, "l1+generated", [7, 5, 9, 11, 7, 4])
    assert max(runs[1:]) <= 14 or name not in ("llama", "gpt2", "opt")  # 20 tokens, of which 6 are common


def means_are_those_of_a_forward_of_each_row(name: str, positions: str, begin: list[int]) -> list[int]:
    """Whether they are; and the tokens of a row in each forward."""
    model, runs = CAUSAL[name](), []
    model.get_input_embeddings().register_forward_hook(lambda _m, args, _out: runs.append(args[0].shape[-1]))
    rows = rows_of([(3, 9), (5, 7), (2, 14), (6, 11), (1, 4)], begin)
    sites, parsed = find_sites(model), parse_positions(positions)
    with mean_states(model, rows, sites, parsed, 0, batch_size=2) as found:  # type: ignore[arg-type]
        found = np.array(found)
    widths = list(runs)
    for place, row in enumerate(rows):
        tokens = edited_tokens(row, parsed)  # type: ignore[arg-type]
        read: dict[int, torch.Tensor] = {}
        handles = [
            model.get_submodule(site.module_path).register_forward_hook(
                lambda _m, _a, out, site=site, read=read: read.__setitem__(
                    site.layer, out[0] if isinstance(out, tuple) else out
                )
            )
            for site in sites
        ]
        with torch.no_grad():
            model(input_ids=torch.tensor([row["input_ids"]]))
        for handle in handles:
            handle.remove()
        for layer in range(len(sites)):
            wanted = read[layer].reshape(len(row["input_ids"]), -1)[tokens].double().mean(0)  # type: ignore[arg-type]
            assert found[place, layer] == pytest.approx(wanted.numpy(), rel=1e-4, abs=1e-5)
    return widths


def test_which_tokens() -> None:
    answer, text = {"input_ids": [1] * 9, "prompt_length": 4}, {"input_ids": [1] * 6, "prompt_length": 6}
    assert edited_tokens(answer, parse_positions("l1+generated")) == [3, 4, 5, 6, 7]  # type: ignore[arg-type]
    assert edited_tokens(answer, parse_positions("l1")) == [3]  # type: ignore[arg-type]
    assert edited_tokens(text, parse_positions("l1+generated")) == [5]  # type: ignore[arg-type]
    assert edited_tokens(text, parse_positions("all")) == [0, 1, 2, 3, 4, 5]  # type: ignore[arg-type]


def test_half_precision_is_averaged_in_float32_and_nothing_stays_on_the_model() -> None:
    model = CAUSAL["llama"]().to(torch.bfloat16)
    rows = rows_of([(2, 30)])
    with mean_states(model, rows, find_sites(model), parse_positions("all"), 0, 1) as found:  # type: ignore[arg-type]
        assert found.dtype == np.float32
        means = np.array(found[0])
    assert not np.array_equal(means, torch.tensor(means).to(torch.bfloat16).float().numpy())
    assert not any(module._forward_hooks for module in model.modules())
