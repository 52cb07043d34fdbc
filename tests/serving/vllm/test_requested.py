import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reftune import ReftuneError
from reftune.serving.folded import read_folded
from reftune.serving.vllm.requested import (
    SELF_TEST,
    ModelShape,
    Requested,
    is_reft,
    read_checked,
    scaled_path,
    split_scale,
)
from tests.serving.vllm.cases import LAYERS, REFT, WIDTH, Cases

SHAPE = ModelShape(LAYERS, WIDTH)


def lora(number: int, path: str) -> Any:
    return SimpleNamespace(lora_int_id=number, lora_path=path, lora_name="a", load_inplace=False)


def test_reft_and_lora_folders_are_told_apart(written: Cases, tmp_path: Path) -> None:
    assert all(is_reft(written.adapter(name)) for name in REFT)
    assert not is_reft(written.adapter("lora"))
    assert not is_reft(str(tmp_path))


def test_a_strength_multiplies_what_is_added_and_makes_another_digest(written: Cases) -> None:
    whole, half = (read_checked(scaled_path(written.adapter("l1"), s), SHAPE) for s in (1.0, 0.5))
    assert half.digest != whole.digest == read_folded(written.adapter("l1")).digest
    for one, other in zip(whole.edits, half.edits, strict=True):
        assert one.folded is not None and other.folded is not None
        assert other.folded.B.equal(0.5 * one.folded.B) and other.folded.A.equal(one.folded.A)


@pytest.mark.parametrize("path", ["a*", "a*b", "a*nan", "a*inf"])
def test_what_is_no_strength_is_refused(path: str) -> None:
    with pytest.raises(ReftuneError, match="is no strength"):
        split_scale(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"component": "mlp_output"}, "vLLM can edit block_output only"),
        ({"act_fn": "gelu"}, "not linear"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_what_vllm_cannot_do_is_refused(change: dict[str, Any], said: str, written: Cases, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(written.adapter("l1"), folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ReftuneError, match=said):
        read_checked(str(folder), SHAPE)


@pytest.mark.parametrize("shape", [ModelShape(1, WIDTH), ModelShape(LAYERS, 32), ModelShape(LAYERS + 1, WIDTH)])
def test_an_adapter_of_another_base_model_is_refused(shape: ModelShape, written: Cases) -> None:
    with pytest.raises(ReftuneError, match="another base model"):
        read_checked(written.adapter("l1_everywhere"), shape)


def test_only_the_served_folders_are_read_where_they_are_named(
    written: Cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFTUNE_ADAPTERS", str(tmp_path))
    for path in (written.adapter("l1"), f"{tmp_path}/../{written.folder.name}/adapters/l1"):
        with pytest.raises(ReftuneError, match="only"):
            read_checked(path, SHAPE)
    shutil.copytree(written.adapter("l1"), tmp_path / "l1")
    assert read_checked(str(tmp_path / "l1"), SHAPE).digest == read_folded(written.adapter("l1")).digest


def test_an_id_stands_for_one_folder_and_one_content(written: Cases, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(written.adapter("l1"), folder)
    requested = Requested(SHAPE)
    first = requested.known(lora(1, str(folder)))
    shutil.rmtree(folder)
    assert requested.known(lora(1, str(folder))) is first
    with pytest.raises(ReftuneError, match="an id of its own"):
        requested.known(lora(1, written.adapter("f7l7_noreft")))
    with pytest.raises(ReftuneError, match="an id of its own"):
        requested.known(lora(1, str(tmp_path / "elsewhere")))
    assert requested.known(lora(2, written.adapter("lora"))).digest is None


def test_a_lora_adapter_that_would_do_nothing_is_refused(written: Cases) -> None:
    with pytest.raises(ReftuneError, match="lora-target-modules none"):
        Requested(SHAPE, lora=False).known(lora(1, written.adapter("lora")))


def test_nobody_else_may_name_the_adapters_of_the_self_test() -> None:
    requested = Requested(SHAPE)
    with pytest.raises(ReftuneError, match="by which an engine tests itself"):
        requested.known(lora(1, f"{SELF_TEST}+"))
    requested.admit_self_test(2, f"{SELF_TEST}+")
    assert requested.known(lora(2, f"{SELF_TEST}+")).digest is not None


def test_a_lora_adapter_outside_of_the_served_folders_is_refused(
    written: Cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFTUNE_ADAPTERS", str(tmp_path))
    for path in (written.adapter("lora"), "someone/repository"):
        with pytest.raises(ReftuneError, match="serves adapters of"):
            Requested(SHAPE).known(lora(1, path))
    shutil.copytree(written.adapter("lora"), tmp_path / "lora")
    assert Requested(SHAPE).known(lora(1, str(tmp_path / "lora"))).digest is None


def test_the_self_tests_adapters_push_the_last_layer_to_opposite_sides() -> None:
    one, other = (read_checked(f"{SELF_TEST}{sign}", SHAPE) for sign in "+-")
    (edit,), (opposite,) = one.edits, other.edits
    assert edit.folded is not None and opposite.folded is not None
    assert edit.layer == LAYERS - 1 and edit.folded.B.equal(-opposite.folded.B) and edit.folded.B.abs().min() > 0
    assert dataclasses.replace(one, edits=()) != dataclasses.replace(other, edits=())
