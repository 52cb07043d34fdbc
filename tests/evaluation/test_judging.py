"""Judges: functions by their file or module, and classifiers beside a plain forward of transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, RobertaForSequenceClassification

from reftune.errors import ReftuneError
from reftune.evaluation.judging import accepted_share, load_judge
from tests.cli.tiny_folder import save_tiny_model
from tests.tiny_classifier import save_tiny_encoder

ANSWERS = ["arr matey", "it is so", "arr", "", "a rope and a mast"]
CODE = """
import numpy as np
LIMIT = 3
def arr(text): return "arr" in text
def length(text): return len(text) / 10
def numpy_one(text): return np.float32(text.count("arr"))
def none(text): return None
def nan(text): return float("nan")
def breaks(text): return 1 / 0
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `rules.py`, `broken.py`, `plain` (a classifier of transformers) and `writer` (no classifier)."""
    folder = tmp_path_factory.mktemp("judges")
    (folder / "rules.py").write_text(CODE)
    (folder / "broken.py").write_text("def f(:\n")
    encoder = save_tiny_encoder(folder / "encoder")
    torch.manual_seed(0)
    model: Any = RobertaForSequenceClassification.from_pretrained(
        encoder, num_labels=3, id2label={0: "plain", 1: "pirate", 2: "Accepted"}
    )
    torch.nn.init.normal_(model.classifier.out_proj.weight, 0, 3.0)
    model.save_pretrained(folder / "plain")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder / "plain")
    save_tiny_model(folder / "writer")
    return folder


def test_functions_accept_with_true_or_with_more_than_a_half(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [True, False, True, False, False]
    assert load_judge(f"{place / 'rules.py'}:arr")(ANSWERS) == wanted
    assert load_judge(f"{place / 'rules.py'}:numpy_one")(ANSWERS) == wanted
    assert load_judge(f"{place / 'rules.py'}:length")(ANSWERS) == [len(text) > 5 for text in ANSWERS]
    monkeypatch.chdir(place)  # a module beside where the command is called
    before = list(sys.path)
    judge = load_judge("rules:arr")
    assert judge(ANSWERS) == wanted and accepted_share(judge, ANSWERS) == 0.4
    assert sys.path == before
    monkeypatch.delitem(sys.modules, "rules")


def test_a_classifier_accepts_what_it_takes_for_the_class(place: Path) -> None:
    model: Any = AutoModelForSequenceClassification.from_pretrained(place / "plain").eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(place / "plain")
    with torch.no_grad():
        found = [int(model(**tokenizer(text or " ", return_tensors="pt")).logits.argmax()) for text in ANSWERS]
    for number, name in ((0, "plain"), (1, "pirate"), (2, "Accepted")):
        assert load_judge(f"{place / 'plain'}:{name}")(ANSWERS) == [one == number for one in found], name
    assert load_judge(str(place / "plain"))(ANSWERS) == [one == 2 for one in found]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere", "is no folder and names no function: write FOLDER"),
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("no_such_module_here:f", "ModuleNotFoundError.*write FOLDER"),
        ("json:", "names no function"),
        ("json:nothing", "json has no function 'nothing'"),
        ("{place}/rules.py:LIMIT", "has, but not as a function"),
        ("{place}/broken.py:f", "SyntaxError"),
        ("{place}", "this folder has neither adapter_config.json nor config.json: write FOLDER, FOLDER:CLASS"),
        ("{place}/plain:parrot", "no class 'parrot'; its classes are plain, pirate, Accepted"),
        ("{place}/writer", "LlamaForCausalLM, not for sequence classification"),
    ],
)
def test_a_judge_that_cannot_be_loaded(place: Path, source: str, said: str) -> None:
    with pytest.raises(ReftuneError, match=said):
        load_judge(source.format(place=place))


@pytest.mark.parametrize(("name", "said"), [("none", "gave None"), ("nan", "gave nan"), ("breaks", "ZeroDivision")])
def test_a_judge_that_does_not_judge(place: Path, name: str, said: str) -> None:
    with pytest.raises(ReftuneError, match=said):
        load_judge(f"{place / 'rules.py'}:{name}")(ANSWERS)
