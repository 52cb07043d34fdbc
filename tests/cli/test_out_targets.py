"""Where --out may point: what this tool did not write is never replaced, and a refused command computes nothing."""

import json
import os
from pathlib import Path
from typing import Any

import pytest


def commands(trained: Path, rows: Path, tmp_path: Path, out: Path) -> dict[str, list[object]]:
    return {
        "generate": ["generate", trained, "--prompt", "hi", "--max-new-tokens", 2, "--out", out],
        "prompts": [
            "generate",
            trained,
            "--prompts-file",
            rows,
            "--column",
            "prompt",
            "--max-new-tokens",
            2,
            "--out",
            out,
        ],
        "eval": ["eval", trained, "--test-file", rows, "--max-new-tokens", 2, "--out", out],
    }


@pytest.mark.parametrize("command", ["generate", "prompts", "eval"])
@pytest.mark.parametrize(
    "place", ["device", "pipe", "link", "dangling", "folder", "foreign", "input", "inside a file", "blank"]
)
def test_a_place_that_is_not_ours_is_refused_and_left(
    cli: Any, trained: Path, rows: Path, tmp_path: Path, command: str, place: str
) -> None:
    table = tmp_path / "rows.csv"
    table.write_bytes(rows.read_bytes())
    foreign = tmp_path / "notes.jsonl"
    foreign.write_text("my notes\n", encoding="utf-8")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(foreign)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    places = {
        "device": Path("/dev/null"), "pipe": tmp_path / "pipe", "link": tmp_path / "link", "blank": Path(" "),
        "dangling": tmp_path / "dangling", "folder": tmp_path, "foreign": foreign, "input": table,
        "inside a file": foreign / "x.jsonl",
    }  # fmt: skip
    before = sorted(path.name for path in tmp_path.iterdir())
    result = cli(*commands(trained, table, tmp_path, places[place])[command])
    assert result.exit_code == 2 and "--out" in result.output and "Traceback" not in result.output, result.output
    assert foreign.read_text(encoding="utf-8") == "my notes\n" and table.read_bytes() == rows.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == before and not Path(" ").exists()


@pytest.mark.parametrize(
    ("command", "held"),
    [
        ("generate", '{"prompt": "a", "completion": "b"}\n'),
        ("generate", '{"prompt": "a", "answer": "b"}\n'),
        ("generate", 'adapter settings of ours: "prompt", "answer", "adapter"\n'),
        ("prompts", "prompt,answer\na,b\n"),
        ("eval", '{\n  "train_file": "a.csv",\n  "test_file": "b.csv"\n}\n'),
        ("eval", '[{"test_file": "b.csv"}]'),
    ],
)
def test_somebodys_data_of_a_similar_form_is_refused_and_left(
    cli: Any, trained: Path, rows: Path, tmp_path: Path, command: str, held: str
) -> None:
    out = tmp_path / "data.jsonl"
    out.write_text(held, encoding="utf-8")
    result = cli(*commands(trained, rows, tmp_path, out)[command])
    assert result.exit_code == 2 and "something else than such results" in result.stderr, result.output
    assert out.read_text(encoding="utf-8") == held


@pytest.mark.parametrize("command", ["generate", "prompts", "eval"])
def test_our_own_results_are_replaced(cli: Any, trained: Path, rows: Path, tmp_path: Path, command: str) -> None:
    out = tmp_path / "answers.jsonl"
    for _ in range(2):
        assert cli(*commands(trained, rows, tmp_path, out)[command]).exit_code == 0
    assert out.read_text(encoding="utf-8").startswith("{")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        {"instruction": "say", "input": "hi", "output": "yo"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
    ],
)
def test_answers_to_prompts_of_every_format_are_replaced(
    cli: Any, trained: Path, tmp_path: Path, row: dict[str, Any]
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text(json.dumps(row) + "\n", encoding="utf-8")
    for _ in range(2):
        result = cli("generate", trained, "--prompts-file", prompts, "--max-new-tokens", 2, "--out", out)
        assert result.exit_code == 0, result.output
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found.keys() == {*row, "answer", "adapter"} and found["adapter"] == str(trained)


def test_a_folder_of_somebodys_rows_takes_no_results_of_tasks(cli: Any, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}", encoding="utf-8")
    (tmp_path / "train.jsonl").write_text("{}\n", encoding="utf-8")
    result = cli("eval", trained, "--task", "boolq", "--data", tmp_path / "train.jsonl", "--out", tmp_path)
    assert result.exit_code == 2 and "name a new or empty folder" in result.stderr, result.output
    assert (tmp_path / "results.json").read_text(encoding="utf-8") == "{}"
