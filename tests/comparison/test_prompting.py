"""The base model behind an instruction or behind examples: another prompt, the same supervised tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from reftune.comparison import Comparison, resolve_comparison, run_comparison, summarise, write_report
from reftune.comparison.methods import judged_rows, prompt_encoding
from reftune.comparison.tables import verdict
from reftune.data.formats import Example, Message, read_examples
from reftune.data.tokenising import Encoding
from reftune.errors import ReftuneError
from reftune.runs.completion import read_data

Written = Callable[..., dict[str, Any]]
TEXT = "Ye be a pirate."
RIVALS: dict[str, Any] = {
    "base": "base",
    "told": {"method": "prompted", "text": TEXT},
    "shown": {"method": "few-shot", "examples": 2},
}


@pytest.fixture(scope="module")
def rivals(place: Path, written: Written) -> Comparison:
    recipe = resolve_comparison(written(place / "rivals", RIVALS, seeds=[0, 1], generate=2, max_new_tokens=3))
    return run_comparison(recipe, own_processes=False)


def by_hand(place: Path, turns: list[dict[str, str]], row: Example) -> tuple[float, int, list[int]]:
    """The summed loss of a row's completion behind turns, by transformers alone; its tokens, and the prompt's."""
    tokenizer: Any = AutoTokenizer.from_pretrained(place / "tiny")
    model = AutoModelForCausalLM.from_pretrained(place / "tiny").double().eval()
    asked = [*turns, {"role": "user", "content": row.messages[-1].content}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    answer = tokenizer(row.completion + "<|im_end|>", add_special_tokens=False).input_ids
    ids, labels = torch.tensor([before + answer]), torch.tensor([[-100] * len(before) + answer])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss) * len(answer), len(answer), before


def test_the_loss_is_that_of_transformers_behind_the_other_prompt(rivals: Comparison, place: Path) -> None:
    train, held_out = read_data(rivals.recipe.shared)
    for seed in (0, 1):
        shown: list[dict[str, str]] = []
        for row in random.Random(seed).sample(train, 2):
            shown.append({"role": "user", "content": row.messages[-1].content})
            shown.append({"role": "assistant", "content": row.completion})
        result = rivals.of("shown")[seed]
        for row, loss, tokens in zip(held_out, result.row_losses, result.row_tokens, strict=True):
            wanted, count, _ = by_hand(place, shown, row)
            assert (loss, tokens) == (pytest.approx(wanted, rel=1e-5), count)
    (told,) = rivals.of("told")  # no seed changes it
    for row, loss in zip(held_out, told.row_losses, strict=True):
        wanted, _, _ = by_hand(place, [{"role": "system", "content": TEXT}], row)
        assert loss == pytest.approx(wanted, rel=1e-5)
    assert len({round(result.loss, 6) for result in rivals.results}) == 4


def test_a_judge_is_asked_of_every_methods_answers(
    rivals: Comparison, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "rules.py").write_text("def even(answer):\n    return len(answer) % 2 == 0\n")
    monkeypatch.chdir(place)
    judged = resolve_comparison(rivals.recipe.folder, {"judge": "rules.py:even"})  # another judge runs nothing again
    assert yaml.safe_load(judged.to_yaml())["judge"] == f"{place / 'rules.py'}:even"
    found = run_comparison(judged, report_only=True)
    summaries = {item.name: item for item in summarise(found)}
    for name, item in summaries.items():
        of_seeds = [[len(answer) % 2 == 0 for answer in result.answers] for result in rivals.of(name)]
        assert item.accepted == pytest.approx(sum(map(sum, of_seeds)) / sum(map(len, of_seeds)))
    assert {item.accepted for item in summarise(rivals)} == {None}
    _, text = write_report(found)
    assert "Accepted" in text.read_text()


def test_a_judge_that_cannot_be_asked_stops_a_comparison_before_it_begins(written: Written, tmp_path: Path) -> None:
    recipe = resolve_comparison(written(tmp_path / "out", RIVALS, judge="nowhere.py:good"))
    with pytest.raises(ReftuneError, match=r"there is no file nowhere.py"):
        run_comparison(recipe, own_processes=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ReftuneError, match=r"nothing is answered.*leave generate out"):
        resolve_comparison(written(tmp_path / "out", RIVALS, judge="rules.py:good", generate=0))


def test_the_supervised_tokens_are_those_of_the_base(rivals: Comparison, place: Path) -> None:
    recipe, tokenizer = rivals.recipe, AutoTokenizer.from_pretrained(place / "tiny")
    train, held_out = read_data(recipe.shared)
    found = {}
    for method in recipe.methods:
        encoding = prompt_encoding(method, recipe.shared.encoding(tokenizer), train, 0)
        rows = judged_rows(method, held_out, recipe.shared, tokenizer, encoding)
        found[method.name] = [[token for token in row["labels"] if token != -100] for row in rows]
    assert found["base"] == found["told"] == found["shown"]
    assert all(result.row_tokens == rivals.results[0].row_tokens for result in rivals.results)
    assert {len(result.answers) for result in rivals.results} == {2}


def test_side_effects_are_measured_behind_the_instruction(written: Written, place: Path, tmp_path: Path) -> None:
    keys = {"neutral_file": str(place / "neutral.csv"), "max_new_tokens": 3}
    found = run_comparison(resolve_comparison(written(tmp_path, RIVALS, **keys)), own_processes=False)
    turns = {"base": [], "told": [{"role": "system", "content": TEXT}]}
    losses = {}
    for name, before in turns.items():
        sums = [by_hand(place, before, row)[:2] for row in read_examples(place / "neutral.csv")]
        losses[name] = sum(loss for loss, _ in sums) / sum(tokens for _, tokens in sums)
        assert found.of(name)[0].side_effects["neutral_loss"] == pytest.approx(losses[name], rel=1e-5)
    told = found.of("told")[0].side_effects
    assert told["neutral_rise"] == pytest.approx(losses["told"] - losses["base"], abs=1e-5)
    assert told["kl"] > 1e-6 and found.of("shown")[0].side_effects["kl"] > 1e-6


def test_an_instruction_goes_before_what_the_row_or_the_recipe_says_itself(place: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(place / "tiny")
    own = Example((Message("system", "Own."), Message("user", "hi")), "")
    encoding = Encoding(tokenizer, system_prompt="Shared.", before=(Message("system", TEXT),))
    assert encoding.render(own).startswith(f"<|im_start|>system\n{TEXT}\n\nOwn.<|im_end|>\n<|im_start|>user\nhi")
    assert encoding.render("hi").startswith(f"<|im_start|>system\n{TEXT}\n\nShared.<|im_end|>\n")
    tokenizer.chat_template = None  # then both go before the prompt as plain text
    plain = replace(encoding, tokenizer=tokenizer, system_prompt=None)
    assert plain.render("hi") == f"{TEXT}\n\nUser: hi\nAssistant:\n"
    shown = replace(plain, before=(Message("user", "ahoy"), Message("assistant", "arr")))
    assert shown.render("hi") == "User: ahoy\nAssistant:\narr<|im_end|>\nUser: hi\nAssistant:\n"


def test_the_verdict_tells_where_prompting_wins(rivals: Comparison, tmp_path: Path) -> None:
    recipe = replace(rivals.recipe, shared=replace(rivals.recipe.shared, output=str(tmp_path)))
    page, text = write_report(replace(rivals, recipe=recipe))
    summaries = summarise(rivals)
    best = min(summaries[1:], key=lambda item: item.loss)
    assert verdict(recipe, summaries)[0].startswith(f"{best.name} has the lowest")
    for said in ("Ye be a pirate.", "reads its instruction", "reads rows of training"):
        assert said in page.read_text() and said in text.read_text()


@pytest.mark.parametrize(
    ("methods", "keys", "said"),
    [
        ({"a": {"method": "prompted"}}, {}, "a: text is missing"),
        ({"a": {"method": "prompted", "text": " "}}, {}, "a: text=' '"),
        ({"a": {"method": "prompted", "system_prompt": "x"}}, {}, "did you mean text"),
        ({"a": {"method": "prompted", "text": "x", "lr": 1e-3}}, {}, "unknown key 'lr'"),
        ({"a": {"method": "few-shot", "k": 2}}, {}, "did you mean examples"),
        ({"a": {"method": "few-shot", "examples": 0}}, {}, "examples=0"),
        ({"a": {"method": "few-shot", "examples": 13}}, {}, "a: examples=13: there are 12 rows"),
        ({"a": {"method": "few-shot", "examples": 8}}, {}, "and the model takes 256: give fewer examples"),
        ({"a": {"method": "prompted", "text": "x" * 300}}, {}, "and the model takes 256: write a shorter text"),
        (
            {"a": {"method": "prompted", "text": "x"}},
            {"max_length": 8, "long_prompts": "truncate"},
            "max_length=8 cuts its completion",
        ),
        (
            {"a": {"method": "prompted", "text": "x" * 150}},
            {"generate": 1, "max_new_tokens": 99},
            "a: .*the prompt has",
        ),
    ],
)
def test_what_cannot_be_prompted_is_told_before_anything_runs(
    written: Written, tmp_path: Path, methods: dict[str, Any], keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(ReftuneError, match=said):
        run_comparison(resolve_comparison(written(tmp_path / "out", methods, **keys)), own_processes=False)
    assert not (tmp_path / "out").exists()
