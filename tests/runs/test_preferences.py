"""`--objective dpo|kto|orpo|grpo|rloo`: TRL's trainers with our rows, positions, files and resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from reftune import ReftuneError
from reftune.cli.app import app
from reftune.runs import preferences, run_training
from reftune.runs.preferences import load_reward, numeric
from reftune.runs.recipe import resolve_recipe
from tests.cli.tiny_folder import save_tiny_model

PAIRS = [{"prompt": f"Say {n}.", "chosen": "yes " * (n % 3 + 1), "rejected": "no"} for n in range(6)]
RATED = [{"prompt": f"Say {n}.", "completion": "yes" if n % 2 else "no", "label": n % 2 == 1} for n in range(6)]
SUMS = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(4)]
ROWS = {"dpo": PAIRS, "orpo": PAIRS, "kto": RATED, "grpo": SUMS, "rloo": SUMS}
JUDGED = {"dpo": "reward_margin", "orpo": "reward_margin", "kto": "kl", "grpo": "reward", "rloo": "reward"}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def opinionated(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an output layer thirty times as large: an edit can change what it writes."""
    folder = tmp_path_factory.mktemp("opinionated")
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors.keys() & {"lm_head.weight", "model.embed_tokens.weight"}:
        tensors[name] = 30 * tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def train(tiny: Path, folder: Path, objective: str, rows: Any = None, **changes: Any) -> Any:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS[objective]), encoding="utf-8")
    fields: dict[str, Any] = {
        "model": str(tiny), "train_file": str(file), "objective": objective, "epochs": 2, "batch_size": 2, "rank": 2,
        "output": str(folder / "out"), "device": "cpu", "layers": 0, "positions": "l1", "lr": 0.05, "tensorboard": False,
        "method": "loreft",
    }  # fmt: skip
    if objective in ("grpo", "rloo"):
        fields |= {"answers": 2, "answer_tokens": 3}
    return run_training(resolve_recipe(None, {**fields, **changes}))


@pytest.mark.parametrize("objective", ROWS)
def test_each_objective_writes_what_a_run_writes(objective: str, tiny: Path, tmp_path: Path) -> None:
    held_out = {} if objective == "orpo" else {"eval_fraction": 0.34}
    run = train(tiny, tmp_path, objective, **held_out)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "loss.png",
        "metrics.json",
        "run.yaml",
        "README.md",
    } <= names
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics == run.metrics and metrics["objective"] == objective and metrics["steps"] > 0
    assert isinstance(metrics[JUDGED[objective]], float)
    assert (metrics["eval_loss"] is None) == (objective == "orpo") and metrics["trainable_parameters"] == 66
    assert "ref" not in json.dumps(sorted(load_file(tmp_path / "out" / "adapter_model.safetensors"))).split("reft")[0]


def test_preferred_answers_win_and_the_reference_is_the_unedited_model(tiny: Path, tmp_path: Path) -> None:
    run = train(tiny, tmp_path, "dpo", epochs=12, batch_size=6, log_every=1, positions="l1+generated", lr=0.2)
    assert run.losses[0] == pytest.approx(0.6931, abs=1e-4)  # log 2: nothing is edited yet
    assert run.losses[-1] < 0.65 and run.metrics["reward_margin"] > 0.1


def test_trl_trains_on_the_tokens_that_every_other_command_writes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(preferences, "begin_training", lambda *args: seen.append(args[2]) or stop())

    def stop() -> None:
        raise ReftuneError("seen enough")

    with pytest.raises(ReftuneError, match="seen enough"):
        train(tiny, tmp_path, "dpo", system_prompt="Be brief.")
    from reftune.data.formats import Example, Message
    from reftune.models import load

    tokenizer = load(str(tiny), device="cpu")[1]
    encoding = resolve_recipe(None, {"train_file": "x", "system_prompt": "Be brief."}).encoding(tokenizer)
    for row, pair in zip(seen[0].train_dataset, PAIRS, strict=True):
        for side in ("chosen", "rejected"):
            example = Example((Message("user", pair["prompt"]),), pair[side])
            [(prompt, answer)] = encoding.turn_ids([example])
            assert (row["prompt_ids"], row[f"{side}_ids"]) == (prompt, answer)


def test_a_resumed_run_ends_where_the_whole_one_does(tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path, "dpo")
    out = tmp_path / "out"
    whole = load_file(out / "adapter_model.safetensors")
    for name in ("metrics.json", "adapter_model.safetensors"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoint-6")
    run = train(tiny, tmp_path, "dpo", resume=True)
    resumed = load_file(out / "adapter_model.safetensors")
    assert run.metrics["steps"] == 6 and all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_an_adapter_learns_to_be_rewarded(opinionated: Path, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(
        "def early(prompts, completions):\n    return [sum(ord(c) < 100 for c in text) / 4 for text in completions]\n"
    )
    run = train(
        opinionated, tmp_path, "grpo", reward=f"{tmp_path}/reward.py:early", epochs=10, answers=8, batch_size=16,
        answer_tokens=4, log_every=1, positions="l1+generated", layers="all", lr=0.1, method="direft",
    )  # fmt: skip
    history = json.loads((tmp_path / "out" / "checkpoint-20" / "trainer_state.json").read_text())["log_history"]
    rewards = [entry["reward"] for entry in history if "reward" in entry]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1 and run.metrics["reward"] == pytest.approx(
        sum(rewards[-2:]) / 2
    )


def test_the_shipped_recipe_trains(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)  # the recipe names its rows and its reward from there
    changes = {"model": str(tiny), "limit_rows": 4, "epochs": 1, "device": "cpu", "output": str(tmp_path / "out")}
    run = run_training(resolve_recipe(root / "recipes" / "rewards" / "sums.yaml", changes))
    assert run.metrics["steps"] == 2 and 0 <= run.metrics["reward"] <= 1.5


def test_the_last_number_is_what_counts() -> None:
    assert numeric(["It is 1,250.", "7, no: 8", "none"], answer=["so #### 1250", 7, "3"]) == [1.0, 0.0, 0.0]
    with pytest.raises(ReftuneError, match="column with the right answer"):
        numeric(["1"], question=["1"])
    with pytest.raises(ReftuneError, match="'none' in 'answer' has no number"):
        numeric(["1"], answer=["none"])


def test_numbers_of_torch_and_numpy_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import torch\ndef f(completions):\n    return torch.ones(len(completions))\n")
    assert load_reward(f"{tmp_path}/mine.py:f")(completions=["a", "b"]) == [1.0, 1.0]


def test_the_command_says_what_came_of_it(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    flags = f"train --model {tiny} --train-file {file} --objective dpo --epochs 1 --device cpu --output {tmp_path}/out"
    result = CliRunner().invoke(app, flags.split())
    assert result.exit_code == 0, result.output
    assert "reward margin" in result.output and "Saved in" in result.output
    assert "| objective | dpo |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("body", "said"),
    [("return [1.0]", "gave 1 numbers for 2 answers"), ("return [float('nan')] * 2", "finite"), ("return None", "gave NoneType"),
     ("1 / 0", "ZeroDivisionError"), ("return 'ab'", "gave str"), ("return [None, 1]", "gave None"), ("return 1.0", "gave float"),
     ("raise SystemExit(0)", "failed: SystemExit"), ("return [1e308, -1e308]", "finite"), ("return {'a': 1}", "gave dict")],
)  # fmt: skip
def test_a_reward_that_gives_no_numbers_is_named(body: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"def f(completions):\n    {body}\n")
    with pytest.raises(ReftuneError, match=said):
        load_reward(f"{tmp_path}/mine.py:f")(completions=["a", "b"], prompts=["c", "d"])


@pytest.mark.parametrize(
    ("objective", "rows", "changes", "said"),
    [
        ("dpo", [{"prompt": "a", "completion": "b"}], {}, "needs prompt, chosen and rejected"),
        ("dpo", [{"prompt": "a", "chosen": "b", "rejected": "b "}], {}, "row 1: chosen and rejected are the same"),
        ("kto", [{"prompt": "a", "completion": "b"}] * 2, {}, "row 1: field 'label' is missing"),
        ("kto", [{"prompt": "a", "completion": "b", "label": "good"}] * 2, {}, "row 1: 'label' is 'good'"),
        ("kto", RATED, {"batch_size": 1}, "batch.size=1"),
        ("grpo", SUMS, {"answers": 3}, "multiple of the 3"),
        ("grpo", SUMS, {"reward": "nowhere.py:f"}, "there is no file nowhere.py"),
        ("grpo", SUMS, {"reward": "mine"}, "names no function"),
        ("grpo", [{"prompt": "a", "answer": "1"}, {"prompt": "a", "answer": "?"}], {}, "row 2: reward 'numeric': '.' in 'answer' has no number"),
        ("grpo", [{"prompt": "a"}], {}, "row 1: reward 'numeric' needs a column"),
        ("dpo", PAIRS, {"answers": 4}, "answers=4 has no meaning"),
        ("dpo", PAIRS, {"reward": "numeric"}, "no meaning"),
        ("dpo", PAIRS, {"prefix_reuse": "on"}, "prefix.reuse='on'"),
        ("dpo", PAIRS, {"beta": -1}, "beta=-1"),
        ("dpo", [{"prompt": "long " * 400, "chosen": "b", "rejected": "c"}], {"max_length": 100}, "row 1: .* tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_with_its_row(
    objective: str, rows: Any, changes: dict[str, Any], said: str, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(ReftuneError, match=said):
        train(tiny, tmp_path, objective, rows, **changes)
    assert not (tmp_path / "out" / "metrics.json").exists()
