from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reftune.cli import app
from reftune.data.formats import LabelledText
from reftune.errors import ReftuneError
from reftune.evaluation.judging import load_judge
from reftune.inference.classifying import load_classifier, predict
from tests.tiny_classifier import glue_rows, save_tiny_encoder, write_jsonl


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained classifier beside its rows."""
    place = tmp_path_factory.mktemp("classifier")
    save_tiny_encoder(place / "encoder")
    rows = write_jsonl(place / "rows.jsonl", glue_rows("rte", 12))
    flags = (
        f"--task classification --glue rte --train-file {rows} --eval-file {rows} --model {place / 'encoder'} --rank 1 "
        f"--positions f3 --epochs 1 --device cpu --no-tensorboard --output {place / 'out'}"
    )
    result = CliRunner().invoke(app, ["train", *flags.split()])
    assert result.exit_code == 0, result.output
    assert "validation accuracy" in result.stdout and "reftune predict" in result.stdout
    return place


def test_predictions_go_to_jsonl_and_csv(classifier: Path, cli, tmp_path: Path) -> None:
    rows = [{"sentence1": "bread, and salt", "sentence2": "tea"}, {"sentence1": "rain", "sentence2": "fog"}]
    file = write_jsonl(tmp_path / "new.jsonl", rows)
    result = cli("predict", classifier / "out", "--file", file, "--out", tmp_path / "deep" / "found.jsonl")
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in (tmp_path / "deep" / "found.jsonl").read_text().splitlines()]
    assert [row["text"] for row in found] == ["bread, and salt", "rain"]
    assert all(set(row["probabilities"]) == {"entailment", "not_entailment"} for row in found)
    assert all(row["probability"] == row["probabilities"][row["label"]] for row in found)
    assert cli("predict", classifier / "out", "--file", file, "--out", tmp_path / "found.csv").exit_code == 0
    with (tmp_path / "found.csv").open() as written:
        table = list(csv.DictReader(written))
    assert [row["text_pair"] for row in table] == ["tea", "fog"]
    assert [row["label"] for row in table] == [row["label"] for row in found]


def test_a_classifier_is_a_judge_of_answers(classifier: Path, cli, tmp_path: Path) -> None:
    texts = ["bread and salt", "rain", "a loud bell", "the red door"]
    found = predict(load_classifier(classifier / "out"), [LabelledText(text, 0) for text in texts])
    for name in ("entailment", "not_entailment"):
        judged = load_judge(f"{classifier / 'out'}:{name}")(texts)
        assert judged == [one.label == name for one in found]
    with pytest.raises(ReftuneError, match="which class is accepted.*entailment, not_entailment"):
        load_judge(str(classifier / "out"))


def test_eval_measures_a_classifier_with_intervals(classifier: Path, cli, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    result = cli("eval", classifier / "out", "--test-file", classifier / "rows.jsonl", "--out", out)
    assert result.exit_code == 0, result.output
    scores = json.loads(out.read_text())
    assert scores["rows"] == 12 and len(scores["predictions"]) == 12
    low, high = scores["intervals"]["accuracy"]
    assert low <= scores["metrics"]["accuracy"] <= high
    assert "95% interval" in result.stdout


@pytest.mark.parametrize(
    ("name", "held"), [("labels.jsonl", '{"text": "a", "label": "entailment"}\n'), ("labels.csv", "text,label\na,0\n")]
)
def test_predictions_replace_predictions_and_no_data(
    classifier: Path, cli, tmp_path: Path, name: str, held: str
) -> None:
    file, out = write_jsonl(tmp_path / "new.jsonl", [{"sentence1": "rain", "sentence2": "fog"}]), tmp_path / name
    out.write_text(held)
    result = cli("predict", classifier / "out", "--file", file, "--out", out)
    assert result.exit_code == 2 and "something else than such results" in result.stderr, result.output
    assert out.read_text() == held
    out.unlink()
    for _ in range(2):
        assert cli("predict", classifier / "out", "--file", file, "--out", out).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--file", "nowhere.csv"], "nowhere.csv"),
        (["--file", "{rows}", "--out", "found.txt"], ".jsonl or a .csv"),
        (["--file", "{other}"], "column 'sentence1' is missing"),
    ],
)
def test_bad_input_is_one_message(classifier: Path, cli, tmp_path: Path, arguments: list[str], words: str) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "a"}])
    parts = [part.format(rows=classifier / "rows.jsonl", other=other) for part in arguments]
    result = cli("predict", classifier / "out", *parts)
    assert result.exit_code == 2 and words in result.stderr and "Traceback" not in result.stderr


def test_an_adapter_that_writes_is_sent_to_generate(trained: Path, cli, rows: Path) -> None:
    result = cli("predict", trained, "--file", rows, "--columns", "text=prompt")
    assert result.exit_code == 2 and "reftune generate" in result.stderr


def test_a_classifier_is_not_chatted_with(classifier: Path, cli) -> None:
    result = cli("generate", classifier / "out", "--prompt", "hi")
    assert result.exit_code == 2 and "reftune predict" in result.stderr
