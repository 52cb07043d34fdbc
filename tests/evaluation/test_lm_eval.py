from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from typer.testing import CliRunner

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'reftune[eval]'")

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import reftune
from reftune.cli import app
from reftune.engine.position_grammar import parse_positions
from reftune.errors import ReftuneError
from reftune.evaluation.lm_eval import ReftuneLM, ScoredRow
from reftune.models import load
from tests.cli.tiny_folder import save_tiny_model
from tests.tiny_models import TINY

REQUESTS = [
    ("the sea is", " wide"),
    ("the sea is wide", " and blue today"),
    ("ab", "cd"),
    ("abc", "d"),
    ("one or two: ", "one"),
    ("", "no context at all"),
]


def requests(*arguments: tuple[Any, ...]) -> Any:
    return [SimpleNamespace(args=one, task_name="") for one in arguments]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("harness") / "base", layers=3)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes an adapter at the given positions that is far from the identity."""

    def write(positions: str) -> Path:
        folder = tmp_path_factory.mktemp("harness") / "adapter"
        model, _ = load(str(base), device="cpu")
        config = reftune.ReftConfig(r=2, layers_to_transform=[0, 1], positions=positions, task_type="CAUSAL_LM")
        edited: Any = get_peft_model(model, config)
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in edited.named_parameters():
                if name.endswith(".bias") and "reft_edits" in name:
                    parameter.copy_(torch.randn_like(parameter) * 5)
        edited.save_pretrained(folder)
        return folder

    return write


def harness_model(folder: Path, **settings: Any) -> ReftuneLM:
    return ReftuneLM(peft=str(folder), device="cpu", **{"batch_size": 2, **settings})


def slow_score(lm: ReftuneLM, context: list[int], continuation: list[int], prompt: int | None = None) -> float:
    """One row alone, and the tokens to edit pointed out one by one."""
    positions = next(iter(lm.model.peft_config.values())).positions
    tokens = [*context, *continuation]
    edited = parse_positions(positions).ordinals(len(context) if prompt is None else prompt, len(tokens))
    mask = torch.tensor([[index in edited for index in range(len(tokens))]])
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([tokens]), intervention_mask=mask).logits[0]
    chosen = logits.log_softmax(-1)[range(len(context) - 1, len(tokens) - 1), continuation]
    return float(chosen.sum())


def slow_request(lm: ReftuneLM, context: str, continuation: str) -> float:
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    before = lm.tok_encode(stripped) if stripped else [lm.prefix_token_id]
    return slow_score(lm, before, lm.tok_encode(continuation))


@pytest.mark.parametrize("positions", ["l1", "f2+l2", "prompt", "generated", "l1+generated", "all"])
def test_each_context_is_the_prompt_of_its_continuation(positions: str, adapter: Any) -> None:
    lm = harness_model(adapter(positions))
    found = [value for value, _ in lm.loglikelihood(requests(*REQUESTS), disable_tqdm=True)]
    assert found == pytest.approx([slow_request(lm, *one) for one in REQUESTS], abs=1e-4)


def test_the_harness_s_own_model_edits_the_answer_instead(adapter: Any, base: Path) -> None:
    def both(positions: str) -> list[list[float]]:
        folder = adapter(positions)
        models = (
            harness_model(folder),
            HFLM(pretrained=str(base), peft=str(folder), device="cpu", dtype="float32", batch_size=2),
        )
        return [[value for value, _ in lm.loglikelihood(requests(*REQUESTS), disable_tqdm=True)] for lm in models]

    ours, theirs = both("l1")
    assert all(abs(one - other) > 1e-2 for one, other in zip(ours[:2], theirs[:2], strict=True))
    ours, theirs = both("all")  # where the prompt's end does not matter, the two agree
    shared = REQUESTS.index(("abc", "d"))  # but for the harness's own slip where "ab"|"cd" has the same first tokens
    assert abs(ours.pop(shared) - theirs.pop(shared)) > 1e-3
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_one_text_cut_at_two_places_is_two_questions(adapter: Any) -> None:
    lm = harness_model(adapter("l1"), batch_size=8)
    tokens = lm.tok_encode("abc")
    alone = [lm.score([ScoredRow(None, tokens, lm.tok_encode("d"), prompt)])[0][0] for prompt in (2, 3)]
    assert abs(alone[0] - alone[1]) > 1e-3
    together = lm.score([ScoredRow(None, tokens, lm.tok_encode("d"), prompt) for prompt in (2, 3)])
    assert [value for value, _ in together] == pytest.approx(alone, abs=1e-5)


def test_choices_of_one_token_share_a_forward(adapter: Any) -> None:
    lm = harness_model(adapter("l1"), batch_size=8)
    sizes: list[int] = []
    handle = lm.model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    asked = [("A or B?", "A"), ("A or B?", "B"), ("yes or no?", "y"), ("yes or no?", "n")]
    found = lm.loglikelihood(requests(*asked), disable_tqdm=True)
    handle.remove()
    assert sizes == [2]
    assert [value for value, _ in found] == pytest.approx([slow_request(lm, *one) for one in asked], abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 64, "auto", "auto:3"])
def test_the_batch_size_changes_nothing(batch_size: int | str, adapter: Any, capsys: Any) -> None:
    lm = harness_model(adapter("f2+l2"), batch_size=batch_size, max_batch_size=4)
    found = [value for value, _ in lm.loglikelihood(requests(*REQUESTS), disable_tqdm=True)]
    assert found == pytest.approx([slow_request(lm, *one) for one in REQUESTS], abs=1e-4)


def test_greedy_answers_are_told_apart(adapter: Any) -> None:
    lm = harness_model(adapter("l1"))
    context = lm.tok_encode("the sea")
    best = lm.model.generate(
        input_ids=torch.tensor([context]), attention_mask=torch.ones(1, len(context)), max_new_tokens=3, do_sample=False
    )[0, len(context) :].tolist()
    other = [*best[:-1], (best[-1] + 1) % 256]
    rows = [ScoredRow(None, context, continuation, len(context)) for continuation in (best, other)]
    assert [greedy for _, greedy in lm.score(rows)] == [True, False]


def test_positions_count_on_what_is_left_of_a_context_that_is_too_long(adapter: Any, caplog: Any) -> None:
    lm = harness_model(adapter("f2+l2"), max_length=9)
    asked = [("a context of many letters", "abcd"), ("short", "abcd")]
    found = [value for value, _ in lm.loglikelihood(requests(*asked), disable_tqdm=True)]
    left = lm.tok_encode(asked[0][0])[-6:]  # 9 tokens go in, and the last of the four letters is never read
    assert found[0] == pytest.approx(slow_score(lm, left, lm.tok_encode("abcd")), abs=1e-4)
    assert "1 of 2 requests are longer than max_length=9" in caplog.text
    with pytest.raises(ReftuneError, match="10 to score; .* max_length=9"):
        lm.loglikelihood(requests(("a", "0123456789")), disable_tqdm=True)


@pytest.mark.parametrize("positions", ["l1", "generated", "all"])
def test_the_perplexity_of_a_text_is_that_of_an_empty_context(positions: str, adapter: Any) -> None:
    lm = harness_model(adapter(positions))
    rolling = lm.loglikelihood_rolling(requests(("a text without a prompt",)), disable_tqdm=True)
    (scored, _), *_ = lm.loglikelihood(requests(("", "a text without a prompt")), disable_tqdm=True)
    assert rolling == pytest.approx([scored], abs=1e-4)


def test_later_windows_of_a_long_text_hold_no_prompt(adapter: Any, caplog: Any) -> None:
    lm = harness_model(adapter("l1"), max_length=6)
    text = lm.tok_encode("fourteen chars")
    assert len(text) == 14
    expected = (
        slow_score(lm, [lm.prefix_token_id], text[:6])
        + slow_score(lm, text[5:6], text[6:12], prompt=0)
        + slow_score(lm, text[7:12], text[12:14], prompt=0)
    )
    assert lm.loglikelihood_rolling(requests(("fourteen chars",), ("x",)), disable_tqdm=True)[0] == pytest.approx(
        expected, abs=1e-4
    )
    assert "the prefix token alone is taken" in caplog.text


def test_a_generated_answer_is_that_of_its_prompt_alone(adapter: Any) -> None:
    lm = harness_model(adapter("f2+l2"), batch_size=3)
    prompts, settings = (
        ["short", "a longer prompt", "the longest prompt of all"],
        {"until": ["\n\n"], "max_gen_toks": 6},
    )
    found = lm.generate_until(requests(*((prompt, settings) for prompt in prompts)), disable_tqdm=True)
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([lm.tok_encode(prompt)])
        written = lm.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
        assert text == lm.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).split("\n\n")[0]
    with lm.model.disable_adapter():
        plain = lm.generate_until(requests(*((prompt, settings) for prompt in prompts)), disable_tqdm=True)
    assert plain != found


def test_the_chat_template_is_that_of_training(adapter: Any) -> None:
    folder = adapter("l1")
    turns = [{"role": "user", "content": "hello"}]
    assert harness_model(folder).apply_chat_template(turns).endswith("hello<|im_end|>\n<|im_start|>assistant\n")
    (folder / "run.yaml").write_text('train_file: x.csv\ntemplate: "Q: %s\\nA:"\nsystem_prompt: Be kind.\n')
    lm = harness_model(folder)
    assert lm.apply_chat_template(turns) == "Be kind.\n\nQ: hello\nA:"
    begun = [*turns, {"role": "assistant", "content": " It is"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == "Be kind.\n\nQ: hello\nA: It is"


def test_an_encoder_s_text_is_the_prompt(base: Path) -> None:
    _, tokenizer = load(str(base), device="cpu")
    model = TINY["t5"]()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = reftune.ReftConfig(
        r=2, layers_to_transform=[1], component="encoder.block_output", positions="l1", init="paper",
        task_type="SEQ_2_SEQ_LM",
    )  # fmt: skip
    edited: Any = get_peft_model(model, config)
    lm = ReftuneLM(pretrained=edited, tokenizer=tokenizer, batch_size=2)
    assert lm.backend == "seq2seq"
    asked = [("the sea is", "wide"), ("ab", "cde")]
    found = [value for value, _ in lm.loglikelihood(requests(*asked), disable_tqdm=True)]
    for (context, continuation), value in zip(asked, found, strict=True):
        ids, labels = (
            torch.tensor([lm.tok_encode(text, add_special_tokens=False)]) for text in (context, continuation)
        )
        with torch.no_grad():
            logits = edited(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).logits[0]
        slow = float(logits.log_softmax(-1)[range(labels.shape[1]), labels[0]].sum())
        assert value == pytest.approx(slow, abs=1e-4)


# A task of one's own, from file to figures


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a multiple-choice task and a generation task over a local file."""
    folder = tmp_path_factory.mktemp("harness") / "task"
    folder.mkdir()
    rows = [
        {"question": f"Is {number} even?", "choices": ["yes", "no", "y"], "answer": number % 2, "gold": "yes"}
        for number in range(7, 12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "rows.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1.0},
    }
    choose = {
        "task": "even_choice", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    write = {
        "task": "even_write", "output_type": "generate_until", "doc_to_target": "{{gold}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    for one in (choose, write):
        (folder / f"{one['task']}.yaml").write_text(yaml.safe_dump({**shared, **one}))
    return folder


def test_a_local_task_is_scored_at_the_adapter_s_positions(task: Path, adapter: Any) -> None:
    folder = adapter("l1")
    results = simple_evaluate(
        model="reftune", model_args={"peft": str(folder)}, device="cpu", batch_size=2, tasks=["even_choice"],
        task_manager=TaskManager(include_path=str(task), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    assert results is not None
    lm = harness_model(folder)
    right = 0
    for sample in results["samples"]["even_choice"]:
        choices = [slow_request(lm, sample["doc"]["question"], f" {choice}") for choice in sample["doc"]["choices"]]
        assert [float(one[0]) for one in sample["filtered_resps"]] == pytest.approx(choices, abs=1e-3)
        right += choices.index(max(choices)) == sample["doc"]["answer"]
    assert results["results"]["even_choice"]["acc,none"] == pytest.approx(right / 5)


def test_the_command_passes_its_arguments_to_the_harness(task: Path, adapter: Any, tmp_path: Path) -> None:
    arguments = [
        "lm-eval", "--model_args", f"peft={adapter('l1')}", "--tasks", "even_choice,even_write", "--device", "cpu",
        "--include_path", str(task), "--output_path", str(tmp_path / "scores"), "--apply_chat_template",
        "--log_samples", "--batch_size", "3",
    ]  # fmt: skip
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "even_choice" in outcome.output
    (written,) = (tmp_path / "scores").rglob("results_*.json")
    scores = json.loads(written.read_text())
    assert set(scores["results"]) == {"even_choice", "even_write"}
    assert scores["config"]["model"] == "reftune"
    (samples,) = (tmp_path / "scores").rglob("samples_even_write_*.jsonl")
    prompt = json.loads(samples.read_text().splitlines()[0])["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.endswith("even?<|im_end|>\n<|im_start|>assistant\n")


def test_help_says_what_the_model_type_takes() -> None:
    outcome = CliRunner().invoke(app, ["lm-eval", "--help"])
    assert outcome.exit_code == 0, outcome.output
    assert "peft=DIR" in outcome.output and "--tasks" in outcome.output


# What a user may get wrong


def test_what_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    with pytest.raises(ReftuneError, match="peft=DIR, pretrained=NAME or both"):
        ReftuneLM(device="cpu")
    with pytest.raises(ReftuneError, match="nowhere: is not a folder"):
        ReftuneLM(peft=str(tmp_path / "nowhere"), device="cpu")
    with pytest.raises(ReftuneError, match="has no adapter_config.json"):
        ReftuneLM(peft=str(tmp_path), device="cpu")


def test_without_an_adapter_the_base_is_scored_and_that_is_said(base: Path, adapter: Any, caplog: Any) -> None:
    lm = ReftuneLM(pretrained=str(base), device="cpu", batch_size=2)
    assert "the base model is scored" in caplog.text
    edited = harness_model(adapter("l1"))
    assert isinstance(edited.model, PeftModel)
    with edited.model.disable_adapter():
        same = edited.loglikelihood(requests(*REQUESTS), disable_tqdm=True)
    found = lm.loglikelihood(requests(*REQUESTS), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in same], abs=1e-4)


def test_a_missing_harness_is_told_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "reftune.evaluation.lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    with pytest.raises(ReftuneError, match=r"pip install 'reftune\[eval\]'"):
        import reftune.evaluation.lm_eval  # noqa: F401
