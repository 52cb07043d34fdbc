"""A task is generated or scored, judged, written as it goes, and resumed; the paper's settings are used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reftune.errors import ReftuneError
from reftune.evaluation import task_runs
from reftune.evaluation.options import OptionRow, evaluate_options
from reftune.evaluation.task_rows import TaskRow
from reftune.evaluation.task_runs import difference, evaluate_task
from reftune.evaluation.tasks import TASKS
from reftune.inference.generation import GenerationSettings, generate_answers, generation_config
from reftune.inference.loading import EditedModel
from tests.inference.edited import tiny_edited

# A task whose answers a model of one token a byte can give: the first letter that is an a or an e.
TASK = replace(
    TASKS["boolq"], name="toy", template="%s\n", words=("a", "e"),
    extract=lambda text: next((letter for letter in text if letter in "ae"), None),
)  # fmt: skip
ROWS = [TaskRow(f"say {'something ' * (n % 3)}{n}", "ae"[n % 2], f"toy.json, row {n}") for n in range(9)]
SETTINGS = GenerationSettings(max_new_tokens=6, batch_size=2)


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> EditedModel:
    return tiny_edited(tmp_path_factory.mktemp("model"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_those_of_generation_and_are_judged(edited: EditedModel, tmp_path: Path) -> None:
    score = evaluate_task(edited, TASK, ROWS, SETTINGS, out=tmp_path)
    truth = [answer.text for answer in generate_answers(edited, [row.instruction for row in ROWS], SETTINGS)]
    assert [record["answer"] for record in score.records] == truth
    written = lines(tmp_path / "toy.edited.jsonl")
    assert [record["row"] for record in written] == list(range(9))
    for record, row in zip(written, ROWS, strict=True):
        assert record["prompt"].startswith("<|im_start|>") and row.instruction in record["prompt"]
        assert record["gold"] == row.answer and record["extracted"] == TASK.extract(record["answer"])  # type: ignore[misc]
        assert record["right"] == (record["extracted"] == row.answer)
    right = [record["right"] for record in written]
    assert score.accuracy == sum(right) / 9
    interval = score.metrics["accuracy"].interval
    assert interval.low <= sum(right) / 9 <= interval.high


def test_the_base_is_evaluated_without_the_edit_and_compared_on_the_same_rows(edited: EditedModel) -> None:
    ours, base = (evaluate_task(edited, TASK, ROWS, SETTINGS, base=base) for base in (False, True))
    assert [r["answer"] for r in ours.records] != [r["answer"] for r in base.records]
    gap = difference(ours, base, "accuracy")
    assert gap.mean == pytest.approx((ours.accuracy or 0) - (base.accuracy or 0))
    assert difference(ours, ours, "accuracy").p_value == 1.0


def test_the_papers_prompt_stands_around_the_instruction(edited: EditedModel) -> None:
    score = evaluate_task(edited, TASK, ROWS[:1], SETTINGS, template="paper")
    assert score.records[0]["prompt"] == f"{ROWS[0].instruction}\n"
    score = evaluate_task(edited, TASK, ROWS[:1], SETTINGS, template="Q: %s A:")
    assert score.records[0]["prompt"] == f"Q: {ROWS[0].instruction} A:"
    with pytest.raises(ReftuneError, match="0 places for the prompt"):
        evaluate_task(edited, TASK, ROWS[:1], SETTINGS, template="nothing")


class Stopped(Exception):
    pass


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    edited: EditedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    settings = replace(SETTINGS, temperature=temperature)
    whole = evaluate_task(edited, TASK, ROWS, settings)
    asked: list[str] = []

    def counted(model: Any, prompts: Any, *more: Any, **named: Any) -> Iterator[Any]:
        if len(asked) >= 4 and not resumed:
            raise Stopped
        asked.extend(prompts)
        yield from generate_answers(model, prompts, *more, **named)

    resumed = False
    monkeypatch.setattr(task_runs, "generate_answers", counted)
    with pytest.raises(Stopped):
        evaluate_task(edited, TASK, ROWS, settings, out=tmp_path)
    file = tmp_path / "toy.edited.jsonl"
    assert len(lines(file)) == 4
    file.write_text(file.read_text() + '{"row": 8, "answ')  # a write that was cut off
    resumed = True
    again = evaluate_task(edited, TASK, ROWS, settings, out=tmp_path)
    assert len(asked) == len(ROWS)
    assert again.records == whole.records
    assert [record["row"] for record in lines(file)] == list(range(9))
    evaluate_task(edited, TASK, ROWS, settings, out=tmp_path)
    assert len(asked) == len(ROWS)  # nothing was left to do


def test_results_of_other_settings_are_not_mixed(edited: EditedModel, tmp_path: Path) -> None:
    evaluate_task(edited, TASK, ROWS[:2], SETTINGS, out=tmp_path)
    evaluate_task(edited, TASK, ROWS[:2], replace(SETTINGS, batch_size=5), out=tmp_path)
    with pytest.raises(
        ReftuneError, match="toy.edited.jsonl holds results of other settings .decoding: .*another --out"
    ):
        evaluate_task(edited, TASK, ROWS[:2], replace(SETTINGS, max_new_tokens=7), out=tmp_path)
    with pytest.raises(ReftuneError, match="rows: 2, now 3"):
        evaluate_task(edited, TASK, ROWS[:3], SETTINGS, out=tmp_path)
    with pytest.raises(ReftuneError, match="template: null, now"):
        evaluate_task(edited, TASK, ROWS[:2], SETTINGS, template="paper", out=tmp_path)
    for name, parameter in edited.model.named_parameters():
        if "reft_edits" in name and name.endswith("bias"):
            with torch.no_grad():
                parameter.add_(1.0)
            with pytest.raises(ReftuneError, match="adapter: "):
                evaluate_task(edited, TASK, ROWS[:2], SETTINGS, out=tmp_path)
            with torch.no_grad():
                parameter.sub_(1.0)


def test_a_prompt_that_leaves_no_room_is_named_before_anything_is_generated(edited: EditedModel) -> None:
    rows = [*ROWS, TaskRow("x" * 300, "a", "toy.json, row 99")]
    with pytest.raises(ReftuneError, match="toy.json, row 99: the prompt has .* leaves no room .* 256"):
        evaluate_task(edited, TASK, rows, SETTINGS)


def test_answers_are_cut_where_the_context_ends(edited: EditedModel) -> None:
    row = TaskRow("x" * 150, "a")
    score = evaluate_task(edited, TASK, [row], replace(SETTINGS, max_new_tokens=2000))
    assert len(score.records) == 1


def test_options_are_scored_with_every_norm(edited: EditedModel, tmp_path: Path) -> None:
    rows = [OptionRow(f"question {n}", ("yes", "no", "something longer"), n % 3, f"row {n}") for n in range(5)]
    score = evaluate_task(edited, "options", rows, SETTINGS, out=tmp_path)
    truth = evaluate_options(edited.model, edited.tokenizer, rows)
    assert list(score.metrics) == ["acc", "acc_norm", "acc_token"]
    for record, expected, row in zip(lines(tmp_path / "options.edited.jsonl"), truth, rows, strict=True):
        assert record["log_likelihoods"] == pytest.approx(list(expected.log_likelihoods), abs=1e-4)
        assert record["gold"] == row.options[row.answer or 0]
        assert record["right"]["acc_norm"] == expected.right("acc_norm")
    base = evaluate_task(edited, "options", rows, SETTINGS, base=True)
    assert base.records[0]["log_likelihoods"] != score.records[0]["log_likelihoods"]


def test_a_tasks_options_are_its_names_or_its_texts(edited: EditedModel) -> None:
    task = TASKS["siqa"]
    values = {"context": "A.", "question": "Why?", "answerA": "x", "answerB": "y", "answerC": "z", "label": 3}
    rows = task.rows([values])
    label = evaluate_task(edited, task, rows, SETTINGS, scoring="options").records[0]
    assert label["options"][0] == "the correct answer is answer1" and label["gold"].endswith("answer3")
    chat = evaluate_task(edited, task, rows, SETTINGS, scoring="options", form="text").records[0]
    assert chat["options"] == ["x", "y", "z"] and "A. Why?" in chat["prompt"] and "answer1" not in chat["prompt"]
    paper = evaluate_task(edited, task, rows, SETTINGS, scoring="options", form="text", template="paper").records[0]
    assert (paper["prompt"], paper["options"]) == ("Question: A. Why?\nAnswer:", [" x", " y", " z"])


def test_instructions_become_a_file_for_alpaca_eval(edited: EditedModel, tmp_path: Path) -> None:
    rows = TASKS["instruct"].rows([{"instruction": "Write.", "dataset": "helpful_base"}, {"instruction": "Sing."}])
    settings = replace(TASKS["instruct"].decoding, max_new_tokens=5)
    score = evaluate_task(edited, "instruct", rows, settings, base=True, template="paper", out=tmp_path)
    assert score.accuracy is None and score.metrics == {}
    file = json.loads((tmp_path / "instruct.base.json").read_text())
    assert [set(row) for row in file] == [{"instruction", "output", "generator", "dataset"}] * 2
    assert [row["dataset"] for row in file] == ["helpful_base", "instruct"]
    assert file[0]["output"] == score.records[0]["answer"]
    assert score.records[0]["prompt"].endswith("### Instruction:\nWrite.\n\n### Response:\n")


def test_the_papers_decoding_reaches_generation(edited: EditedModel) -> None:
    math = generation_config(edited, TASKS["gsm8k"].decoding)
    assert (math.do_sample, math.temperature, math.top_p, math.top_k) == (True, 0.3, 0.75, 40)
    commonsense = generation_config(edited, TASKS["arc_easy"].decoding)
    assert (commonsense.do_sample, commonsense.max_new_tokens, commonsense.top_k) == (False, 32, None)
    instruct = generation_config(edited, TASKS["instruct"].decoding)
    assert (instruct.do_sample, instruct.no_repeat_ngram_size, instruct.repetition_penalty) == (False, 5, 1.1)
    with pytest.raises(ReftuneError, match="top_k=-1"):
        GenerationSettings(top_k=-1)


def test_nothing_to_evaluate_is_an_error(edited: EditedModel) -> None:
    with pytest.raises(ReftuneError, match="no rows"):
        evaluate_task(edited, TASK, [])
    with pytest.raises(ReftuneError, match="'arc' is not known"):
        evaluate_task(edited, "arc", ROWS)
