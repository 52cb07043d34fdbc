from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reftune.comparison import Comparison, ComparisonInterrupted, resolve_comparison, run_comparison, runner
from reftune.comparison.results import run_folder
from reftune.errors import ReftuneError
from reftune.inference.loading import load_edited
from tests.comparison.conftest import METHODS

Written = Callable[..., dict[str, Any]]
TWO = {name: METHODS[name] for name in ("LoReFT l1", "LoRA")}


def test_every_method_learns_and_is_measured(compared: Comparison) -> None:
    assert [result.method for result in compared.results] == list(METHODS)
    assert not compared.failed
    base = compared.of("base")[0]
    for result in compared.results[1:]:
        assert result.loss < result.curve[0][1], f"{result.method} did not learn"
        assert result.best_loss == min(loss for _, loss in result.curve)
        assert len(result.epoch_seconds) == 2 and result.train_seconds > 0 and result.steps == 6
        assert result.trainable_parameters > 0 and result.adapter_bytes > 0
        assert result.loss == pytest.approx(sum(result.row_losses) / sum(result.row_tokens))
        assert result.row_tokens == base.row_tokens
        assert len(result.answers) == 2 and result.exact_match is not None
        assert set(result.options_right) == {"acc", "acc_norm"} and len(result.options_right["acc"]) == 4
    assert (base.trainable_parameters, base.steps, base.train_seconds) == (0, 0, 0.0)


def test_methods_that_start_as_the_base_model_start_at_its_loss(compared: Comparison) -> None:
    base = compared.of("base")[0].loss
    for name in ("LoReFT l1", "DiReFT all", "LoRA", "DoRA", "IA3", "full", "LoRA + LoReFT"):
        assert compared.of(name)[0].curve[0][1] == pytest.approx(base, abs=1e-5), name


def test_all_methods_meet_the_same_batches_in_the_same_order(
    compared: Comparison, written: Written, tmp_path: Path
) -> None:
    orders = {result.order for result in compared.results if result.method != "base"}
    assert len(orders) == 1
    recipe = resolve_comparison(written(tmp_path, {"LoRA": METHODS["LoRA"]}, seeds=[1]))
    assert run_comparison(recipe, own_processes=False).results[0].order not in orders


def test_counts_of_trained_parameters_are_those_of_the_formulas(compared: Comparison) -> None:
    counts = {result.method: result.trainable_parameters for result in compared.results}
    hidden, rank = 16, 2
    assert counts["LoReFT l1"] == 2 * rank * hidden + rank
    assert counts["LoRA"] == 2 * 2 * rank * (hidden + hidden)
    assert counts["LoRA + LoReFT"] == counts["LoRA"] // 2 + counts["LoReFT l1"]
    assert counts["prompt"] == 3 * hidden


def test_the_adapter_of_an_edit_loads_and_gives_the_measured_answers(compared: Comparison) -> None:
    from reftune.inference.generation import GenerationSettings, generate_answers

    result = compared.of("DiReFT all")[0]
    folder = run_folder(compared.recipe, compared.recipe.method("DiReFT all"), 0) / "adapter"
    edited = load_edited(folder, device="cpu")
    answers = generate_answers(edited, compared.held_out[:2], GenerationSettings(max_new_tokens=3))
    assert [answer.text for answer in answers] == result.answers


def test_a_comparison_that_was_broken_off_goes_on_where_it_stopped(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = resolve_comparison(written(tmp_path / "out", TWO))
    real, ran = runner.execute, []

    def interrupted(recipe: Any, method: Any, seed: int, tell: Any, **how: Any) -> Any:
        if ran:
            raise KeyboardInterrupt
        ran.append(method.name)
        return real(recipe, method, seed, tell, **how)

    monkeypatch.setattr(runner, "execute", interrupted)
    with pytest.raises(ComparisonInterrupted, match="1 of 2 runs were finished"):
        run_comparison(recipe, own_processes=False)
    first = run_folder(recipe, recipe.methods[0], 0) / "result.json"
    before = first.read_bytes(), first.stat().st_mtime_ns

    def counted(recipe: Any, method: Any, seed: int, tell: Any, **how: Any) -> Any:
        ran.append(method.name)
        return real(recipe, method, seed, tell, **how)

    monkeypatch.setattr(runner, "execute", counted)
    whole = run_comparison(resolve_comparison(tmp_path / "out"), own_processes=False)
    assert ran == ["LoReFT l1", "LoRA"]
    assert [result.method for result in whole.results] == ["LoReFT l1", "LoRA"]
    assert (first.read_bytes(), first.stat().st_mtime_ns) == before

    # A changed recipe runs again what it changed, and nothing else.
    changed = {**TWO, "LoRA": {**TWO["LoRA"], "rank": 1}}
    run_comparison(resolve_comparison(written(tmp_path / "out", changed)), own_processes=False)
    assert ran == ["LoReFT l1", "LoRA", "LoRA"]
    judged = resolve_comparison(written(tmp_path / "out", changed, judge_by="best", title="Other"))
    run_comparison(judged, own_processes=False)
    assert len(ran) == 3, "what the report alone uses made runs again"
    run_comparison(resolve_comparison(written(tmp_path / "out", changed, batch_size=2)), own_processes=False)
    assert len(ran) == 5


def test_a_run_that_fails_does_not_take_the_others_with_it(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, real = resolve_comparison(written(tmp_path, TWO)), runner.execute

    def failing(recipe: Any, method: Any, seed: int, tell: Any, **how: Any) -> Any:
        if method.name == "LoReFT l1":
            raise ReftuneError("the machine is tired")
        return real(recipe, method, seed, tell, **how)

    monkeypatch.setattr(runner, "execute", failing)
    found = run_comparison(recipe, own_processes=False)
    assert [result.method for result in found.results] == ["LoRA"]
    assert found.failed == {"LoReFT l1, seed 0": "the machine is tired"}
    with pytest.raises(ReftuneError, match="the machine is tired"):
        run_comparison(recipe, own_processes=False, only=["LoReFT l1"])


@pytest.mark.parametrize(
    ("methods", "keys", "said"),
    [
        ({"good": METHODS["LoRA"], "bad": {"method": "loreft", "layers": 7}}, {}, "7"),
        ({"good": METHODS["LoRA"], "bad": {"method": "lora", "target_modules": ["query"]}}, {}, "q_proj"),
        ({"good": METHODS["LoRA"]}, {"generate": 1, "max_new_tokens": 4000}, "lower max_new_tokens"),
        ({"good": METHODS["LoRA"]}, {"max_length": 10}, "the prompt has"),
        ({"good": METHODS["LoRA"]}, {"train_file": "nowhere.csv"}, "nowhere.csv"),
    ],
)
def test_what_cannot_work_is_told_before_the_first_run(
    written: Written, tmp_path: Path, methods: dict[str, Any], keys: dict[str, Any], said: str
) -> None:
    recipe = resolve_comparison({**written(tmp_path / "out", methods), **keys})
    with pytest.raises(ReftuneError) as error:
        run_comparison(recipe, own_processes=False)
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


def test_two_processes_at_a_time_give_the_same_figures_and_tell_their_memory(
    compared: Comparison, written: Written, place: Path, tmp_path: Path
) -> None:
    options = str(place / "options.jsonl")
    recipe = resolve_comparison(
        written(
            tmp_path,
            TWO,
            generate=2,
            max_new_tokens=3,
            options=options,
            neutral_file=str(place / "neutral.csv"),
            refusal_file=str(place / "refusals.csv"),
        )  # fmt: skip
    )
    results = run_comparison(recipe, jobs=2).results
    assert [result.method for result in results] == list(TWO)
    for apart in results:
        here = compared.of(apart.method)[0]
        assert (apart.loss, apart.order, apart.answers) == (
            pytest.approx(here.loss, abs=1e-5),
            here.order,
            here.answers,
        )
        assert apart.fingerprint == here.fingerprint
        assert here.peak_memory_bytes is None
        assert apart.peak_memory_bytes is not None and 1 << 18 < apart.peak_memory_bytes < 1 << 30
    apart = results[0]
    stored = json.loads((run_folder(recipe, recipe.methods[0], 0) / "result.json").read_text())
    assert stored["peak_memory_bytes"] == apart.peak_memory_bytes
    assert not list(tmp_path.rglob("*log.txt")), "the log of a run that went well was left"


def test_edits_may_share_a_store_of_prefixes(written: Written, tmp_path: Path, compared: Comparison) -> None:
    recipe = resolve_comparison(written(tmp_path, {"LoReFT l1": METHODS["LoReFT l1"]}, seeds=[0, 1]))
    found = run_comparison(recipe, own_processes=False, share_prefixes=True)
    assert [result.shared_prefixes for result in found.results] == [True, True]
    assert found.results[0].loss == pytest.approx(compared.of("LoReFT l1")[0].loss, abs=1e-5)
    with pytest.raises(ReftuneError, match="one process"):
        run_comparison(recipe, share_prefixes=True)


def test_side_effects_of_every_method_are_against_the_same_base(compared: Comparison) -> None:
    found = {result.method: result.side_effects for result in compared.results}
    names = {"neutral_loss", "neutral_rise", "kl", "repetition", "refused_harmless", "refused_harmful"}
    assert all(set(one) == names for one in found.values())
    assert (found["base"]["kl"], found["base"]["neutral_rise"]) == (
        pytest.approx(0, abs=1e-7),
        pytest.approx(0, abs=1e-7),
    )
    for name, one in found.items():
        before = one["neutral_loss"] - one["neutral_rise"]
        assert before == pytest.approx(found["base"]["neutral_loss"], abs=1e-5), name
        assert name == "base" or one["kl"] > 1e-6, name


def test_results_without_side_effects_are_those_of_a_recipe_without_them(written: Written, tmp_path: Path) -> None:
    plain = resolve_comparison(written(tmp_path / "out", {"base": "base"}))
    (before,) = run_comparison(plain, own_processes=False).results
    path = run_folder(plain, plain.methods[0], 0) / "result.json"
    values = json.loads(path.read_text())
    assert values.pop("side_effects") == {}  # as it was written before there were any
    path.write_text(json.dumps(values))
    assert run_comparison(plain, report_only=True, own_processes=False).results == (before,)
    with_them = resolve_comparison(written(tmp_path / "out", {"base": "base"}, side_effects=True))
    assert not run_comparison(with_them, report_only=True, own_processes=False).results
