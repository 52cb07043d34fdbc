"""Answers that are rewarded are written by the function that is trained: log-probabilities of both, token by token.

TRL's trainers write answers with `generate` (left padding, a cache, one token a step) and score them in one forward that
reads prompts from labels. The two share nothing but the model, so each is the other's reference.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from jaxtyping import Float, Int
from peft import get_peft_model
from torch import Tensor
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

import reftune
from tests.integrations.test_trl import ROWS, common, config
from tests.tiny_models import TINY

pytestmark = pytest.mark.filterwarnings("ignore")
EVERY = {"layers_to_transform": "all"}
TRAINERS = {"GRPO": (GRPOTrainer, GRPOConfig), "RLOO": (RLOOTrainer, RLOOConfig)}


def edited(method: str, positions: str) -> Any:
    torch.manual_seed(0)
    return get_peft_model(TINY["llama"](), config(method=method, positions=positions, **EVERY))


def left_padded() -> dict[str, Tensor]:
    lengths = [3, 7, 5]
    ids = torch.randint(3, 90, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = torch.stack([(torch.arange(max(lengths)) >= max(lengths) - n).long() for n in lengths])
    return {"input_ids": ids * mask, "attention_mask": mask}


def rollout(model: Any, prompts: dict[str, Tensor], tokens: int = 6) -> tuple[Int[Tensor, "b s"], Float[Tensor, "b t"]]:
    """Sampled answers behind their prompts, and what `generate` says of each token's probability."""
    torch.manual_seed(2)
    written = model.generate(
        **prompts, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, top_k=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return written.sequences, chosen(torch.stack(written.logits, 1), written.sequences[:, -tokens:])


def chosen(logits: Float[Tensor, "b t v"], tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def training_forward(
    model: Any, ids: Int[Tensor, "b s"], prompts: dict[str, Tensor], tokens: int = 6
) -> Float[Tensor, "b t"]:
    """As TRL does it: labels are the answer's tokens, and say thereby where prompts end."""
    mask = torch.cat([prompts["attention_mask"], torch.ones(len(ids), tokens, dtype=torch.long)], 1)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-tokens] = -100
    logits = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    return chosen(logits[:, -tokens - 1 : -1], ids[:, -tokens:])


@pytest.mark.parametrize("positions", ["l1+generated", "all", "f1+l2"])
@pytest.mark.parametrize("method", ["loreft", "direft"])
def test_generate_and_the_training_forward_are_one_function(method: str, positions: str) -> None:
    model = edited(method, positions).train()
    prompts = left_padded()
    ids, seen = rollout(model, prompts)
    trained = training_forward(model, ids, prompts)
    assert trained.requires_grad
    torch.testing.assert_close(trained.detach(), seen, rtol=0, atol=1e-5)


def test_the_comparison_sees_an_edit_that_is_missing_or_elsewhere() -> None:
    """The control: what would have gone wrong, were rollouts unedited, or edited at other tokens than in training."""
    model = edited("loreft", "l1+generated").train()
    prompts = left_padded()
    with model.disable_adapter():
        ids, unedited = rollout(model, prompts)
    trained = training_forward(model, ids, prompts).detach()
    assert (trained - unedited).abs().max() > 0.1
    ids, seen = rollout(model, prompts)
    other = edited("loreft", "l1").train()
    elsewhere = training_forward(other, ids, prompts).detach()
    torch.testing.assert_close(elsewhere[:, 0], seen[:, 0], rtol=0, atol=1e-5)  # read from the last prompt token alone
    assert (elsewhere - seen)[:, 1:].abs().max() > 0.1


def test_several_adapters_write_as_they_are_trained() -> None:
    model = edited("loreft", "l1+generated")
    model.add_adapter("second", config(method="direft", positions="all", **EVERY))
    prompts = left_padded()
    found = []
    for active in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(active)
        model.train()
        ids, seen = rollout(model, prompts)
        torch.testing.assert_close(training_forward(model, ids, prompts).detach(), seen, rtol=0, atol=1e-5)
        found.append(training_forward(model, ids, prompts).detach())
    assert min((a - b).abs().max() for a, b in zip(found, found[1:], strict=False)) > 0.1


def watch(trainer: Any) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Train, and note in order each rollout and each scoring: its kind, ids, attention mask, log-probabilities."""
    events: list[tuple[str, Tensor, Tensor, Tensor]] = []
    generate, score = trainer.model.generate, trainer._get_per_token_logps_and_entropies

    def generating(**given: Any) -> Tensor:
        written = generate(**given)
        tokens = len(written.logits)
        mask = torch.cat([given["attention_mask"], torch.ones_like(written.sequences[:, -tokens:])], 1)
        logps = chosen(torch.stack(written.logits, 1), written.sequences[:, -tokens:])
        events.append(("rollout", written.sequences, mask, logps))
        return written.sequences

    def scoring(model: Any, ids: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        found = score(model, ids, mask, *args, **kwargs)
        before = events[-1][0]
        kind = "trained" if torch.is_grad_enabled() else {"rollout": "old", "old": "reference"}[before]
        events.append((kind, ids, mask, found[0].detach()))
        return found

    trainer.generation_config.update(output_logits=True, return_dict_in_generate=True)
    trainer.model.generate, trainer._get_per_token_logps_and_entropies = generating, scoring
    trainer.train()
    return events


def largest_difference(rollout: Any, scored: Any) -> float:
    """Between what was said in writing and in scoring of the same rows' answers, which come in another order."""
    written = {tuple(ids[mask == 1].tolist()): logps for ids, mask, logps in zip(*rollout[1:], strict=True)}
    differences = []
    for ids, mask, logps in zip(*scored[1:], strict=True):
        row = tuple(ids[mask == 1].tolist())
        answer = int(mask[-logps.shape[0] :].sum())
        said = next(value for whole, value in written.items() if whole[: len(row)] == row)
        differences.append((logps[:answer] - said[:answer]).abs().max())
    return float(torch.stack(differences).max())


def reference_difference(model: Any, scored: Any) -> float:
    """Between a reference's log-probabilities and those of a model that reads each row by itself."""
    differences = []
    for ids, mask, logps in zip(*scored[1:], strict=True):
        row = ids[mask == 1][None]
        answer = int(mask[-logps.shape[0] :].sum())
        labels = row.clone()
        labels[:, : row.shape[1] - answer] = -100
        with torch.no_grad():
            logits = model(input_ids=row, labels=labels).logits[:, -answer - 1 : -1]
        differences.append((chosen(logits, row[:, -answer:])[0] - logps[:answer]).abs().max())
    return float(torch.stack(differences).max())


def trained_by(kind: str, folder: Path, tokenizer: Any, model: Any, **more: Any) -> Any:
    trainer, settings = TRAINERS[kind]
    return trainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=settings(
            **common(folder, max_steps=3, save_strategy="no", per_device_train_batch_size=8), num_generations=2,
            max_completion_length=6, beta=0.1, num_iterations=2,
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"] + " w9" * (at % 4)} for at, row in enumerate(ROWS)]),
        processing_class=tokenizer,
        **more,
    )  # fmt: skip


@pytest.mark.parametrize("positions", ["l1+generated", "all"])
@pytest.mark.parametrize("method", ["loreft", "direft"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_trl_scores_what_was_written_and_refers_to_the_unedited_model(
    kind: str, method: str, positions: str, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    adapter = config(method=method, positions=positions, **EVERY)
    events = watch(trained_by(kind, tmp_path, tiny_tokenizer, TINY["llama"](), peft_config=adapter))
    assert [event[0] for event in events] == [
        "rollout", "old", "reference", "trained", "trained", "rollout", "old", "reference", "trained",
    ]  # fmt: skip
    for rollout, old, reference, trained in (events[:4], events[5:]):
        assert rollout[2][:, 0].min() == 0, "left padding"
        assert largest_difference(rollout, old) < 1e-5 and largest_difference(rollout, trained) < 1e-5
        assert reference_difference(TINY["llama"](), reference) < 1e-5
        assert largest_difference(rollout, reference) > 0.01, "the edit does something"
    assert largest_difference(events[0], events[4]) > 1e-3, "the control: one step later it is another function"


@pytest.mark.parametrize("kind", TRAINERS)
def test_trl_refers_to_a_copy_of_the_adapter_that_it_was_given(kind: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    given = edited("loreft", "l1+generated")
    events = watch(trained_by(kind, tmp_path, tiny_tokenizer, given))
    for rollout, old, reference in (events[:3], events[5:8]):
        assert largest_difference(rollout, old) < 1e-5
        assert reference_difference(edited("loreft", "l1+generated"), reference) < 1e-5
    assert largest_difference(events[5], events[7]) > 1e-3, "trained since"
    assert reference_difference(TINY["llama"](), events[2]) > 0.01


def test_trl_cannot_give_edits_to_vllm_as_weights_and_says_what_to_use() -> None:
    """`use_vllm=True` sends weights with the adapter merged into them before each rollout: they would be the base's."""
    to_vllm: Any = object.__new__(VLLMGeneration)  # made whole, it starts vLLM
    to_vllm.model, to_vllm._dist = edited("loreft", "all"), Gathering()
    with pytest.raises(reftune.ReftuneError, match="use_vllm.*use_transformers_continuous_batching=True"):
        next(to_vllm._iter_named_params())


class Gathering:
    """One process: nothing is gathered."""

    is_fsdp = False

    def gather_params(self, parameters: list[Tensor]) -> Any:
        return nullcontext()
