from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import reftune
from reftune.errors import ReftuneError
from reftune.inference.loading import load_edited, load_mixture, mix, set_scale
from tests.inference.edited import tiny_edited


def test_the_prompt_format_of_training_is_read_back(tmp_path: Path) -> None:
    edited = tiny_edited(tmp_path / "base")
    edited.model.save_pretrained(str(tmp_path / "out"))
    (tmp_path / "out" / "run.yaml").write_text("template: 'Q: {prompt} A:'\nsystem_prompt: Be kind.\nmax_length: 12\n")
    loaded = load_edited(tmp_path / "out", device="cpu")
    text = loaded.tokenizer.decode(loaded.encoding.prompt_ids(["hi"])[0])
    assert text == "Be kind.\n\nQ: hi A:"
    assert loaded.encoding.limit == 256, "the row length of training is no limit for answers"


def test_a_checkpoint_is_spoken_to_as_its_run(tmp_path: Path) -> None:
    edited = tiny_edited(tmp_path / "base")
    edited.model.save_pretrained(str(tmp_path / "out" / "checkpoint-3"))
    (tmp_path / "out" / "run.yaml").write_text("template: '{prompt}='\n")
    assert load_edited(tmp_path / "out" / "checkpoint-3", device="cpu").encoding.template == "{prompt}="


def test_logits_are_the_same_bit_for_bit_in_a_new_process(tmp_path: Path) -> None:
    edited = tiny_edited(tmp_path / "base")
    ids = edited.encoding.prompt_ids(["hi"])
    with torch.no_grad():
        here = edited.model(torch.tensor(ids)).logits
    edited.model.save_pretrained(str(tmp_path / "out"))
    script = f"""
import json, sys, torch, reftune
from peft import PeftModel
from reftune.models import load
torch.set_num_threads(1)
base, tokenizer = load({str(tmp_path / "base")!r}, device="cpu")
model = PeftModel.from_pretrained(base, {str(tmp_path / "out")!r}).eval()
with torch.no_grad():
    logits = model(torch.tensor({ids!r})).logits
torch.save(logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, capture_output=True)
    there = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.equal(here, there)


def test_an_expression_over_folders_mixes_them_and_more_may_join(tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7]])

    def logits(edited) -> torch.Tensor:
        with torch.no_grad():
            return edited.model(input_ids=ids, prompt_lengths=torch.tensor([3])).logits

    for number, name in enumerate(("one", "two"), start=1):
        edited = tiny_edited(tmp_path / "base", r=number)
        edited.model.save_pretrained(str(tmp_path / name))
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    mixed = load_mixture(f"0.5*{one} - {two}", device="cpu", scale=2.0)
    model = load_edited(one, device="cpu").model
    model.load_adapter(two, adapter_name="two")
    with torch.no_grad(), reftune.mixture(model.eval(), "default - 2*two"):
        wanted = model(input_ids=ids, prompt_lengths=torch.tensor([3])).logits
    assert torch.equal(logits(mixed), wanted)
    set_scale(mixed.model, 1.0, mixed.strengths)
    assert not torch.equal(logits(mixed), wanted)
    alone = load_mixture(one, device="cpu")
    assert torch.equal(
        logits(load_mixture(f"0.5*{one}", device="cpu")), logits(load_edited(one, device="cpu", scale=0.5))
    )
    assert mix(alone, f"one - 2*{two}") == [(Path(one).resolve(), 1.0), (Path(two).resolve(), -2.0)]
    assert torch.equal(logits(alone), wanted) and alone.strengths == {"default": 1.0, "adapter1": -2.0}
    for expression, words in (
        (f"{one} + {tmp_path / 'none'}", "none"), (f"{one} + one", "two terms are one folder"), ("one + ", "no term"),
        (f"nan*{one}", "no finite number"), ("", "no term"),
    ):  # fmt: skip
        with pytest.raises(ReftuneError, match=words):
            mix(alone, expression)
        assert torch.equal(logits(alone), wanted)
