from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from reftune.inference.loading import load_edited
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
