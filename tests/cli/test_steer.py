"""`reftune steer` as it is used: every kind of rows, an adapter like any other, and what cannot be steered."""

from __future__ import annotations

import ast
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

import reftune
from reftune.cli import app
from reftune.errors import ReftuneError
from reftune.inference.generation import GenerationSettings, generate_answers
from reftune.inference.loading import load_edited
from reftune.steering.contrasts import split
from reftune.steering.report import warnings
from reftune.steering.run import steer as run_steer
from reftune.steering.settings import SteerSettings
from tests.cli.test_bad_input import refused
from tests.cli.tiny_folder import save_tiny_model


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


def test_a_judge_tells_the_share_of_answers_accepted_without_the_edit_and_with_it(
    steer, cli, pairs: Path, tmp_path: Path
) -> None:
    rules, out = tmp_path / "rules.py", tmp_path / "out"
    seen = tmp_path / "seen.txt"
    rules.write_text(
        f"def short(text):\n    open({str(seen)!r}, 'a').write(repr(text) + '\\n')\n    return len(text) < 3\n"
    )
    flags = ("--scale", "9", "--layers", "1", "--max-new-tokens", "3")
    result = steer(pairs, *flags, "--judge", f"{rules}:short")
    assert result.exit_code == 0, result.output
    answers = [ast.literal_eval(line) for line in seen.read_text().splitlines()]
    held = found(out)["judged answers"]
    assert len(answers) == 2 * held and f"of {held} greedy answers" in result.stdout
    for name, own in (("base", answers[:held]), ("steered", answers[held:])):
        assert found(out)[f"accepted, {name}"] == sum(len(text) < 3 for text in own) / held
    edited = load_edited(out, device="cpu")  # the adapter that was written gives the answers that were judged
    defaults = SteerSettings()
    prompts = [f"say {n}" for n in split(12, defaults.eval_fraction, defaults.seed)[1]]
    for base, own in ((True, answers[:held]), (False, answers[held:])):
        again = generate_answers(edited, prompts, GenerationSettings(max_new_tokens=3), base=base)
        assert [answer.text for answer in again] == own
    assert answers[:held] != answers[held:]
    scored = cli("eval", out, "--test-file", pairs, "--columns", "prompt=prompt,completion=positive", "--device", "cpu",
                 "--max-new-tokens", 3, "--judge", f"{rules}:short")  # fmt: skip
    assert scored.exit_code == 0 and "accepted by the judge" in scored.stdout, scored.output


def test_a_judge_that_cannot_judge_changes_nothing(steer, cli, pairs: Path, trained: Path, tmp_path: Path) -> None:
    refused(steer(pairs, "--judge", tmp_path / "none.py:f"), "none.py", "no file")
    refused(steer(pairs, "--judge", "nothing"), "FOLDER:CLASS")
    (tmp_path / "rules.py").write_text("def f(text):\n    return 'yes'\n")
    refused(steer(pairs, "--judge", f"{tmp_path / 'rules.py'}:f", "--max-new-tokens", "2"), "'yes'", "True, False")
    assert not (tmp_path / "out").exists()
    refused(cli("eval", trained, "--test-file", pairs, "--no-generate", "--judge", "a:b"), "--no-generate")
    refused(cli("eval", trained, "--side-effects", "--judge", "a:b"), "--test-file")
    refused(cli("eval", trained, "--side-effects", "--refusal-judge", "a:b"), "--refusal-file")


def test_the_strength_has_the_divergence_that_was_asked_for_on_the_rows_it_was_found_on(
    steer, tmp_path: Path, pairs
) -> None:
    neutral = tmp_path / "neutral.jsonl"  # each row twice: those to measure on are those to calibrate on
    one = [{"prompt": f"what {n}", "completion": f"plain {n}"} for n in range(4)]
    neutral.write_text("".join(json.dumps(row) + "\n" for row in one for _ in range(2)))
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


@pytest.fixture(scope="module")
def direction(tmp_path_factory: pytest.TempPathFactory, tiny: Path, pairs: Path) -> Path:
    """A direction at layer 1, as strong as the sides lie apart."""
    out = tmp_path_factory.mktemp("steered") / "out"
    flags = ["--model", str(tiny), "--device", "cpu", "--layers", "1", "--scale", "1", "--output", str(out)]
    result = CliRunner().invoke(app, ["steer", str(pairs), *flags])
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize("method", ["loreft", "direft"])
def test_training_starts_in_the_direction(
    cli, direction: Path, tiny: Path, rows: Path, tmp_path: Path, method: str
) -> None:
    flags = [
        "--train-file",
        rows,
        "--model",
        tiny,
        "--positions",
        "l1+generated",
        "--device",
        "cpu",
        "--no-tensorboard",
    ]
    flags += ["--method", method, "--layers", "0,1", "--lr", "1e-12", "--epochs", "1", "--output", tmp_path / "out"]
    assert cli("train", *flags, "--init-from", direction).exit_code == 0
    started, steered, h = edits_of(tiny, tmp_path / "out"), edits_of(tiny, direction), torch.randn(4, 16)
    assert torch.allclose(started["model.layers.1"](h), steered["model.layers.1"](h), atol=1e-5)
    assert torch.allclose(started["model.layers.0"](h), h, atol=1e-6)  # not in the direction: the identity, as ever


def edits_of(tiny: Path, folder: Path) -> dict[str, Any]:
    model = PeftModel.from_pretrained(reftune.models.load(str(tiny), device="cpu")[0], str(folder))
    return model.base_model.engine.edits("default")  # type: ignore[union-attr, operator]


def test_what_training_cannot_start_from(
    cli, trained: Path, direction: Path, tiny: Path, rows: Path, tmp_path: Path
) -> None:
    def train(*flags: Any) -> Any:
        fixed = [
            "--train-file",
            rows,
            "--model",
            tiny,
            "--device",
            "cpu",
            "--no-tensorboard",
            "--output",
            tmp_path / "out",
        ]
        return cli("train", *fixed, *flags)

    refused(train("--init-from", trained), "loreft", "reftune steer")
    refused(train("--init-from", tmp_path / "none"), "none")
    refused(train("--init-from", direction, "--layers", "0"), "layers.1")
    refused(train("--init-from", direction, "--component", "mlp_output"), "mlp_output")
    refused(train("--init-from", direction, "--method", "noreft"), "NoreftEdit")
    assert not (tmp_path / "out").exists()


def test_a_scale_multiplies_the_edit(cli, direction: Path) -> None:
    def logits(scale: float) -> torch.Tensor:
        edited = load_edited(direction, device="cpu", scale=scale)
        with torch.no_grad():
            return edited.model(input_ids=torch.tensor([[5, 6, 7]]), prompt_lengths=torch.tensor([2])).logits

    edited = load_edited(direction, device="cpu")
    with torch.no_grad(), edited.model.disable_adapter():
        plain = edited.model(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert torch.equal(logits(0.0), plain) and not torch.allclose(logits(1.0), plain)
    (edit,) = edited.model.base_model.engine.edits("default").values()  # type: ignore[union-attr, operator]
    with torch.no_grad():
        edit.bias.mul_(2)
        doubled = edited.model(input_ids=torch.tensor([[5, 6, 7]]), prompt_lengths=torch.tensor([2])).logits
    assert torch.allclose(logits(2.0), doubled, atol=1e-6)
    refused(cli("generate", direction, "--prompt", "a", "--scale", "nan"), "--scale")


def test_chat_changes_the_scale(cli, direction: Path) -> None:
    result = cli("chat", direction, "--device", "cpu", "--max-new-tokens", 2, stdin="/scale 0.5\n/scale much\n/quit\n")
    assert "multiplied by 0.5" in result.output and "Write a number" in result.output


def test_several_folders_with_strengths_answer_together_and_join_a_chat(
    cli, direction: Path, trained: Path, tmp_path: Path
) -> None:
    def answer(adapters: Any, *flags: Any) -> str:
        asked = ("--prompt", "say 3", "--max-new-tokens", 6, "--device", "cpu")
        result = cli("generate", adapters, *asked, "--out", tmp_path / "answers.jsonl", *flags)
        assert result.exit_code == 0, result.output
        return json.loads((tmp_path / "answers.jsonl").read_text())["answer"]

    assert answer(f"0*{direction} + 0*{trained}") == answer(direction, "--scale", 0)
    assert answer(f"3*{direction} - 0*{trained}") == answer(direction, "--scale", 3)
    said = f"/adapters 0.5*out - 2*{trained}\n/scale 0.5\n/adapters 1*nobody + out\n/adapters\n/quit\n"
    result = cli("chat", direction, "--device", "cpu", "--max-new-tokens", 2, stdin=said)
    assert f"Editing: 0.5 of out, -2 of {trained.name}." in result.output and "multiplied by 0.5" in result.output
    assert "nobody" in result.output and "character 1: '' is no term" in result.output
    refused(cli("generate", f"{direction} + {tmp_path / 'none'}", "--prompt", "a", "--device", "cpu"), "none")
    refused(cli("generate", f"inf*{direction}", "--prompt", "a"), "character 1", "no finite number")
    refused(cli("chat", f"{direction} + {direction}", "--device", "cpu"), "second time")
    refused(cli("generate", tmp_path / "none", "--prompt", "a"), "none")


def test_an_expression_is_scored_where_several_adapters_make_sense_and_else_refused(
    cli, direction: Path, trained: Path, pairs: Path, tmp_path: Path
) -> None:
    columns = "prompt=prompt,completion=positive"
    asked = {
        "rows": ("--test-file", pairs, "--columns", columns, "--no-generate"),
        "side effects": ("--side-effects", "--limit-rows", 3, "--max-new-tokens", 4),
    }

    def scores(adapters: Any, what: str, *flags: Any) -> dict[str, Any]:
        out = tmp_path / f"{what}.json"
        result = cli("eval", adapters, *asked[what], "--device", "cpu", "--out", out, *flags)
        assert result.exit_code == 0, result.output
        return {name: value for name, value in json.loads(out.read_text()).items() if name != "adapter"}

    for what in asked:
        assert scores(f"3*{direction} - 0*{trained}", what) == scores(direction, what, "--scale", 3)
        assert scores(f"3*{direction} + {trained}", what) != scores(direction, what, "--scale", 3)
    several = f"0.5*{direction} + {trained}"
    with pytest.raises(ReftuneError, match="the folder of one adapter"):
        load_edited(several, device="cpu")
    refused(cli("predict", several, "--file", pairs), "the folder of one adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging, "raiseExceptions", False)  # the harness logs into what an earlier test has closed
        refused(cli("lm-eval", "--model_args", f"peft={several}", "--tasks", "arc_easy"), "the folder of one adapter")
    refused(cli("eval", f"{direction} + nobody", *asked["rows"], "--device", "cpu"), "nobody")


def test_results_of_a_task_are_not_those_of_another_strength_or_expression(
    cli, direction: Path, trained: Path, tmp_path: Path
) -> None:
    data = tmp_path / "boolq.json"
    data.write_text(json.dumps([{"instruction": f"Is {n} odd?", "answer": "true"} for n in range(2)]))
    asked = ("--task", "boolq", "--data", data, "--device", "cpu", "--max-new-tokens", 2, "--out", tmp_path / "out")
    assert cli("eval", direction, *asked, "--no-base").exit_code == 0
    assert cli("eval", direction, *asked, "--no-base").exit_code == 0
    refused(cli("eval", direction, *asked, "--no-base", "--scale", 2), "other settings")
    refused(cli("eval", f"{direction} + {trained}", *asked, "--no-base"), "other settings")


def test_a_control_vector_goes_out_and_comes_in_again(steer, cli, pairs: Path, tiny: Path, tmp_path: Path) -> None:
    vector = tmp_path / "vector.gguf"
    assert steer(pairs, "--layers", "1", "--scale", "1.5", "--positions", "all", "--gguf", vector).exit_code == 0
    h = torch.randn(3, 16)
    (written,) = edits_of(tiny, tmp_path / "out").values()
    result = cli(
        "steer", vector, "--model", tiny, "--device", "cpu", "--positions", "all", "--output", tmp_path / "again"
    )
    assert result.exit_code == 0, result.output
    (read,) = edits_of(tiny, tmp_path / "again").values()
    assert torch.allclose(written(h), read(h), atol=1e-5)
    refused(steer(vector, "--layers", "0"), "no vector for layer 0")
    other = save_tiny_model(tmp_path / "wide", hidden=24)
    refused(cli("steer", vector, "--model", other, "--output", tmp_path / "wide-out"), "width 16")
    refused(steer(pairs, "--layers", "0", "--gguf", tmp_path / "zero.gguf"), "layer 0")
    assert not (tmp_path / "zero.gguf").exists()
    (notes := tmp_path / "notes.gguf").write_text("how to export a controlvector")
    refused(steer(pairs, "--layers", "1", "--gguf", notes), "something else than such results")
    assert notes.read_text() == "how to export a controlvector"


@pytest.fixture(scope="module")
def when(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("when") / "when.csv"
    path.write_text("prompt,label\n" + "".join(f"{'say' if n % 2 else 'count up'} {n},{n % 2}\n" for n in range(24)))
    return path


@pytest.mark.parametrize("flags", [(), ("--positions", "l1"), ("--remove",)], ids=str)
def test_a_gate_is_found_told_and_written(
    steer, cli, rows: Path, when: Path, tiny: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    result = steer(rows, "--when", when, "--layers", "0,1", "--max-new-tokens", "4", *flags)
    assert result.exit_code == 0, result.output
    out, read = tmp_path / "out", found(tmp_path / "out")
    assert read["method"] == "gated" and "gate of layer 1" in result.output and "held-out tokens" in result.output
    assert [gate["layer"] for gate in read["gates"]] == [0, 1]
    edits = edits_of(tiny, out)
    assert len(edits) == 2
    for edit, gate in zip(edits.values(), read["gates"], strict=True):
        assert edit.threshold.item() == pytest.approx(gate["threshold"], rel=1e-6)
        assert edit.probe.norm() == pytest.approx(1, rel=1e-5)
    for command in (["info", out], ["generate", out, "--prompt", "say 3", "--max-new-tokens", 4, "--device", "cpu"]):
        assert cli(*command).exit_code == 0


def test_the_figures_of_a_gate_are_those_of_the_adapter_that_was_written(
    steer, rows: Path, when: Path, tmp_path: Path
) -> None:
    neutral = tmp_path / "neutral.jsonl"
    asked = [{"prompt": f"{'say' if n < 2 else 'count up'} {n}", "completion": "it"} for n in range(8)]
    neutral.write_text("".join(json.dumps(row) + "\n" for row in asked))
    assert steer(rows, "--when", when, "--layers", "0", "--positions", "l1", "--neutral-file", neutral).exit_code == 0
    read = found(tmp_path / "out")
    edited = load_edited(tmp_path / "out", device="cpu")
    (edit,) = edited.model.base_model.engine.edits("default").values()  # type: ignore[union-attr, operator]
    opened = []
    for row in asked:
        ids = torch.tensor(edited.encoding.prompt_ids([str(row["prompt"])]))
        with torch.no_grad(), edited.model.disable_adapter():
            hidden = edited.model(input_ids=ids, output_hidden_states=True).hidden_states[1][0, -1:]
        opened.append(float(edit.is_open(hidden)))
    (gate,) = read["gates"]
    assert gate["neutral prompts"] == gate["neutral tokens"] == pytest.approx(sum(opened) / 8)
    behind = read["kl behind the gate, nats a token"]
    assert behind < read["kl, nats a token"] if sum(opened) < 8 else behind == read["kl, nats a token"]


def test_a_gate_that_tells_nothing_is_told_and_one_between_the_same_states_refused(
    steer, rows: Path, tmp_path: Path
) -> None:
    same = tmp_path / "same.csv"
    same.write_text("prompt,label\n" + "".join(f"say {n // 2},{n % 2}\n" for n in range(24)))
    refused(steer(rows, "--when", same, "--layers", "0", "--positions", "l1"), "same states on prompts")
    assert not (tmp_path / "out").exists()
    assert steer(rows, "--layers", "0").exit_code == 0
    dull = found(tmp_path / "out") | {"gates": [{"layer": 0.0, "held-out accuracy": 0.6}]}
    assert any("hardly tells where to act" in warning for warning in warnings(dull))


def test_gates_that_cannot_be(steer, pairs: Path, when: Path, tmp_path: Path) -> None:
    refused(steer(pairs, "--when", tmp_path / "none.csv"), "none.csv")
    refused(steer(pairs, "--when", pairs), "label")
    refused(steer(pairs, "--when", when, "--gguf", tmp_path / "a.gguf"), "--gguf")
    refused(steer(pairs, "--when-label", "1"), "--when")
    refused(steer(pairs, "--when", when, "--when-label", "2"), "labels are 0, 1")
    assert not (tmp_path / "out").exists() and not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("objective", ["reps", "reft-r1"])
def test_a_trained_direction_is_written_like_a_found_one(
    steer, pairs: Path, tiny: Path, tmp_path: Path, objective: str
) -> None:
    result = steer(pairs, "--train", objective, "--layers", 1, "--epochs", 1, "--lr", 0.05)
    assert result.exit_code == 0, result.output
    trained, result = found(tmp_path / "out"), steer(pairs, "--layers", 1)
    plain = found(tmp_path / "out")
    assert trained["layers"] == plain["layers"] and trained["strength"] == 1
    side = "held-out loss, steered"
    assert trained[side]["positive"] != plain[side]["positive"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train", "reps", "--remove"], "taken out"),
        (["--train", "reft-r1", "--rank", 2], "one vector"),
        (["--train", "reft-r1", "--layers", "0,1"], "one vector"),
        (["--train", "reps", "--lr", 0], "lr=0"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_one_error(steer, pairs: Path, flags: list[Any], said: str) -> None:
    refused(steer(pairs, *flags), said)


def test_training_needs_pairs(steer, rows: Path) -> None:
    refused(steer(rows, "--train", "reps"), "needs pairs")


def test_a_vector_in_a_pytorch_file_comes_in_and_a_pickle_does_not(steer, tiny: Path, tmp_path: Path) -> None:
    vector, h = torch.randn(16), torch.randn(3, 16)
    torch.save(vector, tmp_path / "one.pt")
    torch.save({1: vector}, tmp_path / "named.pt")
    refused(steer(tmp_path / "one.pt"), "does not say which layer")
    for name, flags in (("one.pt", ["--layers", "-1"]), ("named.pt", [])):
        assert steer(tmp_path / name, *flags, "--positions", "all").exit_code == 0
        (edit,) = edits_of(tiny, tmp_path / "out").values()
        assert torch.allclose(edit(h), h + vector, atol=1e-5)
    torch.save({"model": Path}, tmp_path / "more.pt")
    refused(steer(tmp_path / "more.pt"), "could run code")
    (tmp_path / "list.pkl").write_bytes(pickle.dumps({1: [0.5] * 16}))
    refused(steer(tmp_path / "list.pkl"), "could run code")
    torch.save({1: torch.zeros(16)}, tmp_path / "zero.pt")
    refused(steer(tmp_path / "zero.pt"), "was expected")


@pytest.mark.parametrize("name", ["direction.1", "1", "layer_1", "model.layers.1.output"])
def test_a_vector_in_a_safetensors_file_comes_in(steer, tiny: Path, tmp_path: Path, name: str) -> None:
    vector, h = torch.randn(16), torch.randn(3, 16)
    save_file({name: vector.bfloat16().unsqueeze(0)}, tmp_path / "vector.safetensors")
    assert steer(tmp_path / "vector.safetensors", "--positions", "all").exit_code == 0
    (edit,) = edits_of(tiny, tmp_path / "out").values()
    assert torch.allclose(edit(h), h + vector.bfloat16().float(), atol=1e-5)


def test_safetensors_that_are_no_vectors_are_one_error(steer, tmp_path: Path) -> None:
    path, vector = tmp_path / "vector.safetensors", torch.ones(16)
    save_file({"steering": vector}, path)
    refused(steer(path), "does not say which layer")
    wrong: list[dict[str, torch.Tensor]] = [
        {"1": vector, "layer_1": 2 * vector}, {"a": vector, "b": 2 * vector}, {"layers.1.weight": torch.ones(16, 16)},
        {"1": vector.long()}, {"1": vector / 0}, {"1": 0 * vector}, {},
    ]  # fmt: skip
    for tensors in wrong:
        save_file(tensors, path)
        refused(steer(path), "vector.safetensors")
    save_file({"1": torch.ones(24)}, path)
    refused(steer(path), "width 24")
    path.write_bytes(b"\x00" * 40)
    refused(steer(path), "vector.safetensors", "safetensors")
    assert not (tmp_path / "out").exists()


def test_a_strength_that_makes_the_model_overflow_writes_nothing(tiny: Path, tmp_path: Path) -> None:
    save_file({"1": torch.full((16,), 3e38)}, tmp_path / "vector.safetensors")
    settings = SteerSettings(output=str(tmp_path / "out"), model=str(tiny), device="cpu")
    with pytest.raises(ReftuneError, match="no longer finite"):
        run_steer(str(tmp_path / "vector.safetensors"), settings, Console(quiet=True))
    assert not (tmp_path / "out").exists()
