"""Rows of each task are read from LLM-Adapters' files and from the Hub's columns alike, and judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reftune.data.reading import RawRow
from reftune.errors import ReftuneError
from reftune.evaluation.tasks import GROUPS, TASKS, expand_names, find_file, generic_option_rows

# One row of each Hub dataset's columns, written for this test; the words that the instruction must have; the answer.
HUB_ROWS: dict[str, tuple[dict[str, Any], str, str | float]] = {
    "boolq": ({"question": "is ice cold", "passage": "Ice is.", "answer": True},
              "Please answer the following question with true or false, question: is ice cold?\n\nAnswer format: true/false", "true"),
    "piqa": ({"goal": "Open a jar", "sol1": "Twist it.", "sol2": "Eat it.", "label": 0},
             "Please choose the correct solution to the question: Open a jar\n\nSolution1: Twist it.\n\nSolution2: Eat it.\n\nAnswer format: solution1/solution2", "solution1"),
    "siqa": ({"context": "Ana fell.", "question": "How is she?", "answerA": "hurt", "answerB": "glad", "answerC": "tall", "label": "1"},
             "Please choose the correct answer to the question: Ana fell. How is she?\n\nAnswer1: hurt Answer2: glad Answer3: tall\n\nAnswer format: answer1/answer2/answer3", "answer1"),
    "hellaswag": ({"activity_label": "Rowing", "ctx": "A man", "endings": ["rows.", "melts.", "sings", "is red"], "label": "3"},
                  "Please choose the correct ending to complete the given sentence: Rowing: A man\n\nEnding1: rows.\n\nEnding2: melts.", "ending4"),
    "winogrande": ({"sentence": "Ian sang as _ was glad.", "option1": "Ian", "option2": "Bo", "answer": "2"},
                   "Please choose the correct answer to fill in the blank to complete the given sentence: Ian sang as _ was glad.\n\nOption1: Ian Option2: Bo\n\nAnswer format: option1/option2", "option2"),
    "arc_easy": ({"question": "What melts?", "choices": {"text": ["ice", "sand", "air"], "label": ["1", "2", "3"]}, "answerKey": "1"},
                 "Please choose the correct answer to the question: What melts?\n\nAnswer1: ice Answer2: sand Answer3: air\n\nAnswer format: answer1/answer2/answer3", "answer1"),
    "arc_challenge": ({"question": "What melts?", "choices": {"text": ["ice", "sand"], "label": ["A", "B"]}, "answerKey": "B"},
                      "Answer format: answer1/answer2", "answer2"),
    "openbookqa": ({"question_stem": "The sun is", "choices": {"text": ["a star", "a dog"], "label": ["A", "B"]}, "answerKey": "A"},
                   "question: The sun is\n\nAnswer1: a star Answer2: a dog", "answer1"),
    "aqua": ({"question": "2+2?", "options": ["A)3", "B)4"], "correct": "B"}, "2+2? Answer Choices: (A) 3 (B) 4", "B"),
    "gsm8k": ({"question": "How many?", "answer": "It is 1,200 <<1200>>\n#### 1,200"}, "How many?", 1200.0),
    "mawps": ({"question": "How many?", "result": "7"}, "How many?", 7.0),
    "svamp": ({"Body": "There are 3 cats", "Question": "How many cats?", "Answer": "3.0"}, "There are 3 cats. How many cats?", 3.0),
    "addsub": ({"sQuestion": " How much ? ", "lSolutions": [9.8]}, "How much ?", 9.8),
    "multiarith": ({"question": "How many?", "final_ans": "15"}, "How many?", 15.0),
    "singleeq": ({"sQuestion": "How much?", "lSolutions": [5.0]}, "How much?", 5.0),
}  # fmt: skip


@pytest.mark.parametrize("name", list(HUB_ROWS))
def test_the_hubs_columns_become_the_papers_question(name: str) -> None:
    values, words, answer = HUB_ROWS[name]
    row = TASKS[name].rows([values])[0]
    assert words in row.instruction
    assert row.answer == answer


def test_every_task_that_is_judged_has_a_row_here() -> None:
    assert set(HUB_ROWS) | {"instruct"} == set(TASKS)
    assert [*GROUPS["commonsense"], *GROUPS["arithmetic"]] == list(HUB_ROWS)


def adapters_row(**changes: Any) -> dict[str, Any]:
    row = {
        "instruction": "Please choose the correct answer to the question: Which is it?\n\nAnswer1: a: b Answer2: two, "
        "or so Answer3: three\n\nAnswer format: answer1/answer2/answer3",
        "input": "",
        "output": "the correct answer is answer2",
        "answer": "answer2",
    }
    return {name: value for name, value in {**row, **changes}.items() if value is not None}


def test_llm_adapters_rows_are_read_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "test.json"
    file.write_text(json.dumps([adapters_row(), adapters_row(answer="Answer3 ")]))
    rows = TASKS["arc_easy"].rows(file)
    assert [row.answer for row in rows] == ["answer2", "answer3"]
    assert rows[0].instruction == adapters_row()["instruction"]
    assert len(TASKS["arc_easy"].rows(file, limit=1)) == 1
    aqua = TASKS["aqua"].rows([{"instruction": "x?", "answer": ["C"]}])
    assert aqua[0].answer == "C"


def test_options_are_scored_by_name_as_the_paper_trains_them() -> None:
    task = TASKS["arc_easy"]
    row = task.option_rows(task.rows([adapters_row()]))[0]
    assert row.prompt == adapters_row()["instruction"]
    assert row.options == tuple(f"the correct answer is answer{n}" for n in (1, 2, 3))
    assert row.answer == 1


def test_options_are_found_in_the_instruction() -> None:
    task = TASKS["arc_easy"]
    row = task.option_rows(task.rows([adapters_row()]), "text")[0]
    assert (row.prompt, row.options, row.answer) == ("Which is it?", ("a: b", "two, or so", "three"), 1)


@pytest.mark.parametrize(
    ("name", "prompt", "options", "answer"),
    [
        ("boolq", "is ice cold?", ("yes", "no"), 0),
        ("piqa", "Open a jar", ("Twist it.", "Eat it."), 0),
        ("siqa", "Ana fell. How is she?", ("hurt", "glad", "tall"), 0),
        ("hellaswag", "Rowing: A man", ("rows.", "melts.", "sings", "is red"), 3),
        ("winogrande", "Ian sang as", ("Ian was glad.", "Bo was glad."), 1),
    ],
)
def test_option_texts_of_every_form_follow_their_question(
    name: str, prompt: str, options: tuple[str, ...], answer: int
) -> None:
    task = TASKS[name]
    row = task.option_rows(task.rows([HUB_ROWS[name][0]]), "text")[0]
    assert (row.prompt, row.options, row.answer) == (prompt, options, answer)


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("arc_easy", adapters_row(answer=None), "field 'answer' is missing; this row has: instruction, input, output"),
        ("arc_easy", adapters_row(answer="four"), "field 'answer' is 'four'; give one of answer1, answer2"),
        ("arc_easy", adapters_row(instruction="  "), "field 'instruction' is '  '; give a text"),
        ("arc_easy", {"question": "q", "choices": ["a"], "answerKey": "A"}, "give an object with 'text' and 'label'"),
        ("arc_easy", {"question": "q"}, "field 'choices' is missing"),
        ("openbookqa", {"question_stem": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "E"},
         "field 'answerKey' is 'E', none of A"),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": -1}, "the answer's index -1 is none of the 2"),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": "x"}, "field 'label' is 'x'; give a number"),
        ("hellaswag", {"activity_label": "a", "ctx": "c", "endings": "e"}, "field 'endings' is 'e'; give a list"),
        ("multiarith", {"instruction": "q", "answer": "many"}, "field 'answer' is 'many'; give a number"),
        ("aqua", {"instruction": "q", "answer": "X"}, "field 'answer' is 'X'; give a letter"),
        ("boolq", {"question": None, "answer": True}, "field 'question' is null"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_row_is_named(name: str, row: dict[str, Any], words: str) -> None:
    with pytest.raises(ReftuneError, match="^rows.json, row 5: ") as caught:
        TASKS[name].row(RawRow("rows.json", 5, row))
    assert words in str(caught.value)


def test_options_that_cannot_be_found_are_named() -> None:
    task = TASKS["arc_easy"]
    rows = task.rows([adapters_row(instruction="Which?\n\nAnswer1: a Answer3: b\n\nAnswer format: answer1/answer2")])
    with pytest.raises(ReftuneError, match="row 1: no options .* found: Answer1, Answer3"):
        task.option_rows(rows, "text")
    rows = task.rows([adapters_row(answer="answer4")])
    with pytest.raises(
        ReftuneError, match="the answer is 'answer4', and the question offers answer1, answer2, answer3"
    ):
        task.option_rows(rows)
    with pytest.raises(ReftuneError, match="gsm8k has no options"):
        TASKS["gsm8k"].option_rows([])


def test_groups_expand_to_their_tasks_and_misspelt_names_are_guessed() -> None:
    assert len(expand_names("commonsense")) == 8
    assert expand_names("gsm8k, arithmetic,gsm8k")[0] == "gsm8k"
    assert len(expand_names("gsm8k,arithmetic")) == 7
    with pytest.raises(ReftuneError, match="'arc_esay' is not known; did you mean 'arc_easy'"):
        expand_names("arc_esay")


@pytest.mark.parametrize("name", ["arc_easy.json", "arc_easy_test.json", "arc_easy/test.json", "ARC-Easy/test.json"])
def test_a_folder_holds_a_tasks_file_under_its_usual_names(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps([adapters_row()]))
    assert find_file(TASKS["arc_easy"], tmp_path) == tmp_path / name
    assert find_file(TASKS["piqa"], tmp_path) is None
    assert TASKS["arc_easy"].rows(tmp_path)[0].answer == "answer2"


def test_a_task_without_a_hub_dataset_asks_for_a_file() -> None:
    with pytest.raises(ReftuneError, match="addsub has no Hub dataset .* --data"):
        TASKS["addsub"].rows()


def test_any_file_of_options_needs_answers(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "p", "options": ["a", "b"], "answer": "b"}\n')
    assert generic_option_rows(file)[0].answer == 1
    file.write_text('{"prompt": "p", "options": ["a", "b"]}\n')
    with pytest.raises(ReftuneError, match="row 1: field 'answer' is missing"):
        generic_option_rows(file)


SHARED = Path(__file__).parents[2] / "../shared/data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the development data is not beside this checkout")
def test_the_development_data_is_read_whole() -> None:
    easy = TASKS["arc_easy"].rows(SHARED / "arc_easy")
    assert len(easy) == 2376
    texts = TASKS["arc_easy"].option_rows(easy, "text")
    assert {len(row.options) for row in texts} == {3, 4, 5}
    assert all(row.answer is not None for row in texts)
    assert len(TASKS["arc_easy"].option_rows(easy)) == 2376
    assert [len(TASKS[name].rows(SHARED / "arithmetic")) for name in ("addsub", "multiarith")] == [395, 600]
