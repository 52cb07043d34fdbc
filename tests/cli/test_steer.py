"""`reftune steer` as it is used: every kind of rows, an adapter like any other, and what cannot be steered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import reftune  # noqa: F401
from tests.cli.test_bad_input import refused


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"say {n}", "positive": f"arr {n} matey", "negative": f"it is the number {n}"} for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def steer(cli, tiny: Path, tmp_path: Path):
    def run(source: Any, *flags: Any) -> Any:
        return cli("steer", source, "--model", tiny, "--device", "cpu", "--output", tmp_path / "out", *flags)

    return run


def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "steer.json").read_text())


def test_pairs_become_an_adapter_that_adds_one_vector(steer, cli, pairs: Path, tiny: Path, tmp_path: Path) -> None:
    result = steer(pairs)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    assert {"adapter_config.json", "adapter_model.safetensors", "steer.json", "steer.png", "README.md"} <= {
        path.name for path in out.iterdir()
    }
    base, _ = reftune.models.load(str(tiny), device="cpu")
    model = PeftModel.from_pretrained(base, str(out))
    (edit,) = model.base_model.engine.edits("default").values()  # type: ignore[union-attr, operator]
    h = torch.randn(3, 16)
    added = edit(h) - h
    assert torch.allclose(added, added[:1].expand(3, -1), atol=1e-6) and added.norm() > 1e-3
    for command in (["info", out], ["generate", out, "--prompt", "say 3", "--max-new-tokens", 4, "--device", "cpu"]):
        assert cli(*command).exit_code == 0


def test_the_strength_has_the_divergence_that_was_asked_for_on_the_rows_it_was_found_on(
    steer, tmp_path: Path, pairs
) -> None:
    neutral = tmp_path / "neutral.jsonl"  # the same rows twice: those to measure on are those to calibrate on
    one = [{"prompt": f"what {n}", "completion": f"plain {n}"} for n in range(4)]
    neutral.write_text("".join(json.dumps(row) + "\n" for row in [*one, *one]))
    assert steer(pairs, "--kl", "1e-4", "--neutral-file", neutral).exit_code == 0
    assert found(tmp_path / "out")["kl, nats a token"] == pytest.approx(1e-4, rel=0.01)


def test_instructions_that_change_no_answer_are_told(steer, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"ask {n}"}) + "\n" for n in range(8)))
    instructions = ("--positive-prompt", "Say arr", "--negative-prompt", "Be plain and long")
    refused(steer(prompts, *instructions, "--max-new-tokens", "4"), "alike under both instructions")
    assert not (tmp_path / "out").exists()


def test_labelled_texts_and_completions(steer, tmp_path: Path, rows: Path) -> None:
    labelled = tmp_path / "labelled.csv"
    labelled.write_text("text,label\n" + "".join(f"{'good' if n % 2 else 'bad'} text {n},{n % 2}\n" for n in range(16)))
    given = [
        (labelled,),
        (labelled, "--positive-label", "0", "--estimator", "probe"),
        (rows, "--estimator", "pca", "--layers", "0,1", "--rank", "2", "--remove"),
        (rows, "--scale", "-1", "--positions", "all"),
    ]
    for source, *flags in given:
        result = steer(source, *flags)
        assert result.exit_code == 0, (source, flags, result.output)
    assert found(tmp_path / "out")["strength"] == -1


def test_what_cannot_be_steered(steer, cli, pairs: Path, rows: Path, tmp_path: Path) -> None:
    equal, single, few = (tmp_path / name for name in ("equal.csv", "single.csv", "few.csv"))
    equal.write_text("prompt,positive,negative\n" + "a,b,c\n" * 4 + "a,b,b\n")
    single.write_text("text,label\n" + "some,1\n" * 8)
    few.write_text("prompt,positive,negative\n" + "a,b,c\n" * 3)
    half = tmp_path / "half.csv"
    half.write_text("prompt,positive\n" + "a,b\n" * 5)
    refused(steer(equal), "equal.csv, row 6", "same text")
    refused(steer(single), "single.csv", "two classes")
    refused(steer(few), "at least 4")
    refused(steer(half), "half.csv", "negative")
    refused(steer(tmp_path / "none.csv"), "none.csv")
    refused(steer(pairs, "--kl", "nan"), "--kl")
    refused(steer(pairs, "--kl", "0"), "kl=0")
    refused(steer(pairs, "--scale", "inf"), "--scale")
    refused(steer(pairs, "--remove", "--kl", "1"), "--kl")
    refused(steer(pairs, "--layers", "9"), "9")
    refused(steer(pairs, "--rank", "99"), "rank=99")
    refused(steer(pairs, "--positive-prompt", "x"), "both instructions")
    refused(steer(pairs, "--positions", "x9"), "x9")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine")
    refused(steer(pairs), "diary.txt")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["diary.txt"]
