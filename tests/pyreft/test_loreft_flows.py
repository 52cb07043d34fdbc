"""The flows of the paper's script, pyreft's largest: its own dataset classes, training, and evaluation to the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    TrainingArguments,
)

import reftune.pyreft as pyreft
from tests.cli.tiny_folder import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::UserWarning:transformers")
TRIGGER = {"commonsense": "the answer is ", "gsm8k": "Think, then answer.\n"}
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


class Supervised(pyreft.ReftDataset):
    """Prompts and answers of a task; of GSM8K the last rows of the training split are held out for validation."""

    def preprocess(self, kwargs: Any) -> None:
        self.trigger_tokens, self.original_split = TRIGGER[self.task], self.data_split
        self.test_split = kwargs.get("test_split")
        if self.data_split == "validation":
            self.data_split = "train"
        if self.task == "commonsense":
            self.data_path = str(Path(str(self.data_path)) / f"{self.data_split}.json")

    def postprocess(self, kwargs: Any) -> None:
        if self.task == "gsm8k":
            kept = len(self.task_dataset) - 2
            if self.original_split == "validation":
                self.task_dataset = self.task_dataset.select(range(kept, kept + 2))
            elif self.test_split == "validation":
                self.task_dataset = self.task_dataset.select(range(kept))
        self.raw_dataset = self.task_dataset

    def tokenize(self, data_item: Any) -> Any:
        if self.task == "gsm8k":
            prompt = f"{data_item['question']}\n{self.trigger_tokens}"
            answer = data_item["answer"].replace("####", "The final answer is: ")
        else:
            prompt, answer = f"{data_item['instruction']}\n", self.trigger_tokens + data_item["answer"]
        prompt_ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"][0]
        if self.original_split != "train":
            return {"input_ids": prompt_ids}, len(prompt_ids)
        ids = self.tokenizer(prompt + answer + self.tokenizer.eos_token, return_tensors="pt")["input_ids"][0]
        labels = ids.clone()
        labels[: len(prompt_ids)] = -100
        return {"input_ids": ids, "labels": labels}, len(prompt_ids)


class Glue(pyreft.ReftDataset):
    def preprocess(self, kwargs: Any) -> None:
        self.raw_dataset, self.trigger_tokens, self.num_labels = None, None, None
        self.pad_mode = "last"

    def postprocess(self, kwargs: Any) -> None:
        self.num_labels = len(self.task_dataset.features["label"].names)

    def tokenize(self, data_item: Any) -> Any:
        ids = self.tokenizer(data_item["sentence1"], data_item["sentence2"], return_tensors="pt")["input_ids"][0]
        return {"input_ids": ids, "labels": data_item["label"]}, len(ids)


def edits(width: int, layers: list[int], component: str | None = None, **more: Any) -> pyreft.ReftConfig:
    torch.manual_seed(1)
    places = [
        {"component": component % layer} if component else {"layer": layer, "component": "block_output"}
        for layer in layers
    ]
    return pyreft.ReftConfig(
        representations=[
            {**place, "low_rank_dimension": 2, "intervention": pyreft.LoreftIntervention(
                embed_dim=width, low_rank_dimension=2, dropout=0.05, dtype=torch.float32, act_fn=None, device="cpu", add_bias=False, **more,
            )} for place in places
        ]
    )  # fmt: skip


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "num_train_epochs": 1, "logging_steps": 1,
        "learning_rate": 9e-3, "optim": "adamw_torch", "report_to": "none", "use_cpu": True, "seed": 3,
        "remove_unused_columns": False, "save_strategy": "no",
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**options, **more})


GSM = [{"question": "What is " + "1 + " * n + "1?", "answer": f"Counting. #### {n + 1}"} for n in range(7)]
CHOICES = [{"instruction": f"Is {'very ' * n}warm hot?", "answer": "true" if n % 2 else "false"} for n in range(5)]


@pytest.mark.parametrize("share", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("task", ["gsm8k", "commonsense"])
def test_a_generation_task_is_trained_and_evaluated_to_the_end(task: str, share: bool, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "right"
    for split, rows in (("train", CHOICES), ("test", CHOICES[:3])):
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    given = {"dataset": datasets.Dataset.from_list(GSM)} if task == "gsm8k" else {}
    where = "main" if task == "gsm8k" else str(tmp_path)
    layers = [0, 1] if share else [0, 1, 0, 1]
    options: dict[str, Any] = {"num_interventions": len(layers), "position": "f2+l2", "share_weights": share, **given}
    train = Supervised(task, where, tokenizer, data_split="train", test_split="validation", **options)
    split = "validation" if task == "gsm8k" else "test"
    held_out: Any = Supervised(task, where, tokenizer, data_split=split, **options)
    rows, items = (GSM[5:], held_out.raw_dataset) if task == "gsm8k" else (CHOICES[:3], held_out.raw_dataset)
    assert len(train) == 5 and [dict(item) for item in items] == rows and len(held_out) == len(rows)

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **SIZES))
    model: Any = pyreft.get_reft_model(base, edits(16, layers))
    collator = pyreft.ReftDataCollator(
        DataCollatorForSeq2Seq(tokenizer, model=base, label_pad_token_id=-100, padding="longest")
    )
    model.model.train()
    trainer = pyreft.ReftTrainerForCausalLM(
        model=model, tokenizer=tokenizer, args=arguments(tmp_path / "out"), train_dataset=train, data_collator=collator
    )
    trainer.train()
    model.save(tmp_path / "adapter")
    model.model.eval()
    for _, pair in model.interventions.items():
        assert pair[0].eval() is pair

    tokenizer.padding_side = "left"
    generations = []
    for inputs in torch.utils.data.DataLoader(held_out, batch_size=2, collate_fn=collator):
        locations = inputs["intervention_locations"].permute(1, 0, 2).repeat_interleave(2, dim=1).tolist()
        _, answers = model.generate(
            base={"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]},
            unit_locations={"sources->base": (None, locations)}, intervene_on_prompt=True, num_beams=2,
            eos_token_id=tokenizer.eos_token_id, early_stopping=True, max_new_tokens=4, do_sample=False,
        )  # fmt: skip
        for number, answer in zip(inputs["id"].tolist(), answers, strict=True):
            generations.append((items[number], tokenizer.decode(answer, skip_special_tokens=True)))
    assert [item for item, _ in generations] == rows
    for row, (_, text) in zip(held_out, generations, strict=True):
        alone = {"input_ids": row["input_ids"][None], "attention_mask": torch.ones_like(row["input_ids"])[None]}
        places = [[places] for places in row["intervention_locations"]]
        _, expected = model.generate(
            base=alone, unit_locations={"sources->base": (None, places)}, intervene_on_prompt=True, num_beams=2,
            eos_token_id=tokenizer.eos_token_id, early_stopping=True, max_new_tokens=4, do_sample=False,
        )  # fmt: skip
        assert text == tokenizer.decode(expected[0], skip_special_tokens=True)


def test_glue_is_trained_with_its_best_epoch_kept_and_evaluated_to_the_end(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    features = datasets.Features(
        sentence1=datasets.Value("string"),
        sentence2=datasets.Value("string"),
        label=datasets.ClassLabel(names=["no", "yes"]),
    )
    rows = [{"sentence1": "ab" * (1 + n % 3), "sentence2": "xy" if n % 2 else "a", "label": n % 2} for n in range(12)]
    found = datasets.Dataset.from_list(rows, features=features)
    options: dict[str, Any] = {"num_interventions": 2, "position": "f1", "share_weights": True, "dataset": found}
    train = Glue("glue", "rte", tokenizer, data_split="train", **options)
    whole = Glue("glue", "rte", tokenizer, data_split="validation", **options)
    assert train.num_labels == 2 and train.raw_dataset is None and whole.raw_dataset is whole.task_dataset
    tested, selecting = torch.utils.data.random_split(whole, [8, 4], torch.Generator().manual_seed(0))

    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "num_labels": 2, "pad_token_id": 1, **SIZES}
    config = RobertaConfig(**sizes)
    model: Any = pyreft.get_reft_model(
        RobertaForSequenceClassification(config), edits(16, [0, 1], "roberta.encoder.layer[%s].output")
    )
    for parameter in model.model.classifier.parameters():
        parameter.requires_grad = True
    collator = pyreft.ReftDataCollator(DataCollatorWithPadding(tokenizer, padding="longest"))

    def accuracy(prediction: Any) -> dict[str, float]:
        given = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        return {"accuracy": float((np.argmax(given, axis=1) == prediction.label_ids).mean())}

    trainer = pyreft.ReftTrainerForSequenceClassification(
        model=model, tokenizer=tokenizer, train_dataset=train, eval_dataset=selecting, data_collator=collator,
        compute_metrics=accuracy, args=arguments(
            tmp_path, num_train_epochs=2, eval_strategy="epoch", save_strategy="epoch", save_total_limit=1,
            metric_for_best_model="accuracy", load_best_model_at_end=True,
        ),
    )  # fmt: skip
    trainer.train()
    scores = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(scores) == 2 and trainer.evaluate()["eval_accuracy"] == max(scores) == trainer.state.best_metric

    model.model.eval()
    given, wanted = [], []
    with torch.no_grad():
        for inputs in torch.utils.data.DataLoader(tested, batch_size=3, collate_fn=collator):  # type: ignore[arg-type]
            places = inputs["intervention_locations"].permute(1, 0, 2).tolist()
            asked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            _, output = model(asked, unit_locations={"sources->base": (None, places)})
            given += output.logits.argmax(dim=-1).tolist()
            wanted += inputs["labels"].tolist()
    assert wanted == [rows[number]["label"] for number in tested.indices] and len(given) == 8
    model.save(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
