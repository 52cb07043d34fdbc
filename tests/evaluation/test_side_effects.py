"""Side effects beside their formulas, worked out by hand or in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from reftune.errors import ReftuneError
from reftune.evaluation.side_effects import AgainstBase, is_refusal, read_refusal_rows, repetition
from tests.tiny_models import CAUSAL


def rows_of(prompts: list[int]) -> list[Any]:
    """Rows of the same answers behind prompts of these lengths."""
    draw, rows = torch.Generator().manual_seed(1), []
    for prompt, total in zip(prompts, (6, 3, 4), strict=True):
        answer = torch.randint(3, 90, (total,), generator=draw).tolist()
        ids = [5 + n % 7 for n in range(prompt)] + answer
        rows.append({"input_ids": ids, "labels": [-100] * prompt + answer, "prompt_length": prompt})
    return rows


def test_divergence_and_forgetting_of_lora_behind_other_prompts_in_float64() -> None:
    base = CAUSAL["llama"]()
    other: Any = get_peft_model(
        copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules=["q_proj"])
    ).eval()
    plain, behind = rows_of([3, 5, 2]), rows_of([9, 4, 6])
    against = AgainstBase(base, plain, 0, batch_size=2)
    kl, loss = against(other, behind)

    def log_probabilities(model: Any, row: Any) -> torch.Tensor:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        return logits[row["prompt_length"] - 1 : -1].double().log_softmax(-1)

    wanted, surprise, before, tokens = 0.0, 0.0, 0.0, 0
    for one, two in zip(plain, behind, strict=True):
        p, q = log_probabilities(base, one), log_probabilities(other, two)
        answer = one["input_ids"][one["prompt_length"] :]
        wanted += float((p.exp() * (p - q)).sum())
        surprise -= float(q[range(len(answer)), answer].sum())
        before -= float(p[range(len(answer)), answer].sum())
        tokens += len(answer)
    assert kl == pytest.approx(wanted / tokens, rel=1e-4)
    assert loss == pytest.approx(surprise / tokens, rel=1e-5)
    assert against.base_loss == pytest.approx(before / tokens, rel=1e-5)
    assert kl > 0.01
    changed = copy.deepcopy(plain)
    changed[0]["labels"][-1] = 7
    with pytest.raises(ReftuneError, match="other tokens"):
        against(other, changed)


def test_repetition_by_hand() -> None:
    looped = [1, 2, 1, 2, 1, 2, 1]  # runs 1212 2121 1212 2121: two different ones of four
    assert repetition([looped]) == 0.5
    assert repetition([[1, 2, 3, 4, 5], looped, [7, 7]]) == pytest.approx(0.5 / 3)
    assert repetition([]) == 0.0


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("  *I\N{RIGHT SINGLE QUOTATION MARK}m unable to do so*", True),
        ("\N{LEFT DOUBLE QUOTATION MARK}As an AI, I have no views.", True),
        ("Sure! I cannot wait to help.", False),
        ("The word sorry is an adjective.", False),
        ("", False),
    ],
)
def test_what_begins_like_a_refusal(answer: str, refuses: bool) -> None:
    assert is_refusal(answer) is refuses


def test_refusal_rows(tmp_path: Path) -> None:
    path = tmp_path / "asked.csv"
    path.write_text("prompt,label\nBake bread,harmless\nPick a lock,Harmful\n")
    assert [(row.text, row.label) for row in read_refusal_rows(path)] == [
        ("Bake bread", "harmless"),
        ("Pick a lock", "harmful"),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "asked.csv"),
        ("text,label\n", "asked.csv"),
        ("text,label\na,harmless\n", "no row is labelled harmful"),
        ("text,label\na,harmless\nb,bad\n", "row 3: label 'bad' is unknown"),
        ("text,label\na,harmless\n ,harmful\n", "row 3"),
        ("text,label\na,harmless\nb,\n", "row 3"),
        ("question,label\na,harmless\n", "hold none of|label"),
        ("prompt,kind\na,harmless\n", "label"),
    ],
)
def test_refusal_rows_that_cannot_be_used(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "asked.csv"
    path.write_text(content)
    with pytest.raises(ReftuneError, match=said):
        read_refusal_rows(path)
