"""`reftune eval --task`: tables, files, averages, and messages for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reftune.evaluation.tasks import GROUPS

TWO = {"arc_easy", "arc_challenge"}


def adapters_file(path: Path, count: int = 4) -> Path:
    rows: list[dict[str, Any]] = [
        {
            "instruction": f"Please choose the correct answer to the question: Is it {n}?\n\nAnswer1: yes Answer2: no\n\n"
            "Answer format: answer1/answer2",
            "input": "",
            "answer": f"answer{n % 2 + 1}",
        }
        for n in range(count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def test_a_task_is_generated_for_base_and_edited(cli, trained: Path, tmp_path: Path) -> None:
    data, out = adapters_file(tmp_path / "rows.json"), tmp_path / "out"
    result = cli(
        "eval", trained, "--task", "arc_easy", "--data", data, "--max-new-tokens", 3, "--out", out, "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    for words in ("arc_easy", "base", "edited", "difference", "results.json"):
        assert words in result.stdout
    found = json.loads((out / "results.json").read_text())["tasks"]["arc_easy"]
    assert found["base"]["rows"] == 4 and found["scoring"] == "generate"
    assert {"value", "low", "high"} == set(found["edited"]["metrics"]["accuracy"])
    assert 0 < found["difference"]["accuracy"]["p_value"] <= 1
    record = json.loads((out / "arc_easy.edited.jsonl").read_text().splitlines()[0])
    assert {"row", "prompt", "answer", "gold", "extracted", "right"} == set(record)
    assert record["prompt"].startswith("<|im_start|>")  # as in training, which this folder's run.yaml tells


def test_tasks_at_a_time_score_what_they_score_one_after_another(cli, trained: Path, tmp_path: Path) -> None:
    for name in TWO:
        adapters_file(tmp_path / "data" / name / "test.json", 2)
    asked = (
        "eval", trained, "--task", ",".join(TWO), "--data", tmp_path / "data", "--max-new-tokens", 3,
        "--device", "cpu",
    )  # fmt: skip
    found = {}
    for jobs in (1, 2):
        out = tmp_path / f"out-{jobs}"
        result = cli(*asked, "--out", out, "--jobs", jobs)
        assert result.exit_code == 0, result.output
        found[jobs] = {file.name: file.read_text() for file in out.glob("*.jsonl")}
    assert len(found[1]) == 4 and found[1] == found[2]
    assert "arc_easy: done" in result.stderr and set(json.loads((out / "results.json").read_text())["tasks"]) == TWO


def test_options_are_scored_and_several_tasks_average(cli, trained: Path, tmp_path: Path) -> None:
    stems = {"boolq": "true", "piqa": "solution", "hellaswag": "ending", "winogrande": "option"}
    for name in GROUPS["commonsense"]:
        file = adapters_file(tmp_path / "data" / name / "test.json", 2)
        stem = stems.get(name)
        if stem:
            text = file.read_text().replace("answer1/answer2", f"{stem}1/{stem}2").replace('"answer1"', f'"{stem}1"')
            text = text.replace('"answer2"', f'"{stem}2"')
            file.write_text(text.replace("true1", "true").replace("true2", "false"))
    result = cli(
        "eval", trained, "--task", "commonsense", "--data", tmp_path / "data", "--scoring", "options",
        "--template", "paper", "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "commonsense, mean" in result.stdout and "piqa, acc_norm" in result.stdout
    summary = json.loads((tmp_path / "out" / "results.json").read_text())
    values = [summary["tasks"][name]["base"]["metrics"]["acc"]["value"] for name in GROUPS["commonsense"]]
    assert summary["averages"]["commonsense"]["base"] == pytest.approx(sum(values) / 8)
    record = json.loads((tmp_path / "out" / "piqa.base.jsonl").read_text().splitlines()[0])
    assert record["options"] == ["the correct answer is solution1", "the correct answer is solution2"]
    assert record["prompt"].startswith("Please choose") and record["prompt"].endswith("\n")


def test_any_file_of_options_can_be_scored(cli, trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,options,answer\nis it?,yes|no,no\nwas it?,yes|no,0\n")
    result = cli("eval", trained, "--task", "options", "--data", file, "--no-base")
    assert result.exit_code == 0, result.output
    assert "options, acc_norm" in result.stdout and "difference" not in result.stdout


def test_a_base_model_is_evaluated_alone(cli, tiny: Path, tmp_path: Path) -> None:
    data, out = adapters_file(tmp_path / "rows.json"), tmp_path / "out"
    result = cli(
        "eval", tiny, "--base-only", "--task", "arc_easy", "--data", data, "--out", out, "--max-new-tokens", 2,
        "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert not (out / "arc_easy.edited.jsonl").exists()
    record = json.loads((out / "arc_easy.base.jsonl").read_text().splitlines()[0])
    assert record["prompt"].startswith("Please choose")  # the paper's prompt: nothing was trained


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give one of --test-file"),
        (["--task", "arc_easy", "--test-file", "rows.csv"], "give one of --test-file"),
        (["--test-file", "rows.csv", "--base-only"], "--base-only scores tasks"),
        (["--task", "arc_esay"], "did you mean 'arc_easy'"),
        (["--task", "options"], "give it with --data"),
        (["--task", "arc_easy,piqa", "--data", "ROWS"], "name a folder with a file for each"),
        (["--task", "gsm8k", "--data", "ROWS", "--scoring", "options"], "gsm8k has no options to score"),
        (["--task", "arc_easy", "--data", "ROWS", "--out", "ROWS"], "it is a folder"),
        (["--task", "boolq", "--data", "ROWS"], "row 1: field 'answer' is 'answer1'; give one of true, false"),
    ],
)
def test_what_cannot_be_is_said_and_ends_with_status_2(
    cli, trained: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    rows = str(adapters_file(tmp_path / "rows.json"))
    result = cli("eval", trained, *[rows if part == "ROWS" else part for part in arguments])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert words in " ".join(result.stderr.split())
