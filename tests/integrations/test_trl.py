"""ReFT under TRL's own trainers: SFT padded, packed and padding-free, DPO against the disabled adapter, GRPO, RLOO."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

import reftune
from reftune.engine.hooks import Engine
from tests.tiny_models import TINY

ROWS = [
    {"prompt": f"one two w{i} w{i + 3}", "completion": " " + " ".join(f"w{(i * 7 + k) % 60}" for k in range(2 + i % 4))}
    for i in range(12)
]


def common(folder, **changes: Any) -> dict[str, Any]:
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 6, "logging_steps": 1,
        "learning_rate": 2e-2, "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "seed": 0,
        "gradient_checkpointing": False, "save_steps": 3,
    }  # fmt: skip
    return {**settings, **changes}


def config(**changes: Any) -> reftune.ReftConfig:
    return reftune.ReftConfig(**{"r": 2, "positions": "l1", "task_type": "CAUSAL_LM", "init": "paper", **changes})


def edited_rows(model: Any) -> list[torch.Tensor]:
    """Every state that the first edit reads from now on."""
    seen: list[torch.Tensor] = []
    first = next(iter(Engine.of(model.get_base_model()).edits("default").values()))
    first.register_forward_hook(lambda module, args, output: seen.append(args[0].detach().clone()))
    return seen


def prompt_states(tokenizer: Any, rows: list[dict], layer: int = 0) -> torch.Tensor:
    """What the base model's block gives at the last prompt token of each row, computed row by row."""
    model, states = TINY["llama"](), []
    model.model.layers[layer].register_forward_hook(lambda module, args, output: states.append(output))
    found = []
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            model(ids)
        found.append(states[-1][0, -1])
    return torch.stack(found)


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_free": True, "max_length": None}, {"packing": True}, {"gradient_checkpointing": True}],
    ids=["padded", "padding-free", "packed", "checkpointed"],
)
def test_sft_edits_the_last_prompt_token_of_every_row_and_learns(tmp_path, tiny_tokenizer, options: dict):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = SFTTrainer(
            model=TINY["llama"](),
            args=SFTConfig(**common(tmp_path, **{"max_length": 32, "completion_only_loss": True, **options})),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tiny_tokenizer,
            peft_config=config(),
        )
        assert isinstance(trainer.model, PeftModel)
        seen = edited_rows(trainer.model)
        trainer.train()
    expected = prompt_states(tiny_tokenizer, ROWS)
    first_batch = seen[0]
    assert len(first_batch) >= 4 if not options.get("packing") else len(first_batch) >= 1
    distance = torch.cdist(first_batch, expected).min(dim=1).values
    if not options.get("packing") and not options.get("padding_free"):
        assert distance.max() < 1e-4, "an edited row is not the last prompt token of any row"
    else:
        # The eager or sdpa attention of this model cannot keep packed documents apart, so only the first is comparable.
        assert distance[0] < 1e-4
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert not (tmp_path / "checkpoint-3" / "model.safetensors").exists()
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").exists()


def test_sft_on_whole_texts_is_refused_with_the_way_out(tmp_path, tiny_tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = SFTTrainer(
            model=TINY["llama"](),
            args=SFTConfig(**common(tmp_path, max_length=32)),
            train_dataset=Dataset.from_list([{"text": "one two three w1 w2"}] * 8),
            processing_class=tiny_tokenizer,
            peft_config=config(),
        )
        with pytest.raises(reftune.ReftuneError, match="completion_only_loss=True"):
            trainer.train()


def test_dpo_prefers_the_chosen_answer_against_the_disabled_adapter(tmp_path, tiny_tokenizer):
    rows = [{"prompt": row["prompt"], "chosen": " w1 w2", "rejected": " w3 w4"} for row in ROWS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = DPOTrainer(
            model=TINY["llama"](),
            args=DPOConfig(**common(tmp_path, max_length=32, max_steps=8, beta=0.5)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer,
            peft_config=config(init="identity", positions="l2"),
        )
        seen = edited_rows(trainer.model)
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert abs(history[0]["loss"] - 0.6931) < 1e-3, "at the start the edit is the identity, so policy equals reference"
    assert history[-1]["rewards/margins"] > 0.05 > abs(history[0]["rewards/margins"])
    assert all(len(states) == 16 for states in seen), (
        "two tokens of four chosen and four rejected rows; none in reference"
    )
    assert len(seen) == 8


@pytest.mark.parametrize(
    ("of_trainer", "of_settings", "positions"),
    [(GRPOTrainer, GRPOConfig, "l1+generated"), (GRPOTrainer, GRPOConfig, "f2+l3"), (RLOOTrainer, RLOOConfig, "l2")],
)
def test_rollouts_under_continuous_batching_are_those_of_the_edited_model(
    tmp_path, tiny_tokenizer, of_trainer: Any, of_settings: Any, positions: str
):
    """The log-probabilities that the rollout saw are those of the training forward, which reads prompts from labels."""
    model = TINY["llama"]()
    rollouts: list[Any] = []
    trainer = of_trainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=of_settings(
            **common(tmp_path, max_steps=2, save_strategy="no"), num_generations=2, max_completion_length=6, beta=0.0,
            use_transformers_continuous_batching=True,
            transformers_continuous_batching_config={
                "num_blocks": 64, "page_size": 8, "max_batch_tokens": 256, "return_logprobs": True,
            },
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
        processing_class=tiny_tokenizer,
        peft_config=config(positions=positions, share_weights=positions != "f2+l3"),
    )  # fmt: skip
    own = trainer.model.get_base_model()
    batch = own.generate_batch
    own.generate_batch = lambda *args, **kwargs: rollouts.append(batch(*args, **kwargs)) or rollouts[-1]
    seen: list[dict[str, Any]] = []
    score = trainer._get_per_token_logps_and_entropies

    def scored(model: Any, ids: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        found = score(model, ids, mask, *args, **kwargs)
        with model.disable_adapter():
            plain = score(model, ids, mask, *args, **kwargs)
        seen.append({"ids": ids, "logps": found[0].detach(), "plain": plain[0].detach()})
        return found

    trainer._get_per_token_logps_and_entropies = scored
    trainer.train()
    compared = 0
    scored_again = len(seen) // len(rollouts)  # RLOO: before the step, and in it
    for rollout, step in zip(rollouts, seen[::scored_again], strict=True):
        for result in rollout.values():
            answer, whole = result.generated_tokens, [*result.prompt_ids, *result.generated_tokens]
            for ids, logps, plain in zip(step["ids"].tolist(), step["logps"], step["plain"], strict=True):
                begin = next(place for place, token in enumerate(ids) if token != tiny_tokenizer.pad_token_id)
                if ids[begin : begin + len(whole)] == whole:
                    expected = torch.tensor(result.logprobs)
                    torch.testing.assert_close(logps[: len(answer)], expected, rtol=1e-4, atol=1e-4)
                    assert not torch.allclose(plain[: len(answer)], expected, atol=1e-2)
                    compared += 1
    assert compared >= 8
