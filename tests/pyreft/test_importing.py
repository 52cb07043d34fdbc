"""Adapters that pyreft saved become adapters of this library."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from benchmarks.parity_pyreft import cases, ours
from reftune.errors import ReftuneError
from reftune.pyreft.importing import import_pyreft
from reftune.pyreft.reading import read_pyreft

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", cases.GOLDEN)
def test_an_imported_adapter_gives_pyrefts_logits_through_peft(name: str, tmp_path: Path) -> None:
    written, assumed = import_pyreft(GOLDEN / name, tmp_path, positions="f2+l2")
    assert written == [tmp_path]
    assert any("dropout" in line for line in assumed) and any("activation" in line for line in assumed)
    model = PeftModel.from_pretrained(ours.tiny_model(), str(tmp_path)).eval()
    ids = torch.from_numpy(cases.tokens(list(cases.CASES).index(name), 2, 7))
    with torch.no_grad():
        assert (model(input_ids=ids).logits - ours.expected_logits(GOLDEN)[name]).abs().max() < 1e-5


def test_untied_pairs_become_one_adapter_with_two_edits_a_layer(tmp_path: Path) -> None:
    import_pyreft(GOLDEN / "generation", tmp_path, positions="f2+l2")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["share_weights"] is False and config["layers_to_transform"] == [0, 2]
    record = ours.expected_generations(GOLDEN)["tiny"]
    model = PeftModel.from_pretrained(ours.tiny_model(), str(tmp_path)).eval()
    for prompt, expected in list(zip(record["prompts"], record["tokens"], strict=True))[:3]:
        ids = torch.tensor([prompt])
        found: Any = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        assert found[0, len(prompt) :].tolist() == expected


def test_file_names_of_older_versions_are_read(tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(GOLDEN / "loreft", old)
    config = json.loads((old / "config.json").read_text())
    (key,) = config["sorted_keys"]
    config["sorted_keys"] = ["layer.1.comp.block_output.unit.pos.nunit.1#0"]
    (old / "config.json").write_text(json.dumps(config))
    (old / f"intkey_{key}.bin").rename(old / "intkey_layer.1.comp.block_output.unit.pos.nunit.1#0.bin")
    first, second = read_pyreft(old)[0].intervention, read_pyreft(GOLDEN / "loreft")[0].intervention
    assert first is not None and second is not None
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_without_positions_the_report_says_what_was_assumed(tmp_path: Path) -> None:
    _, tied = import_pyreft(GOLDEN / "loreft", tmp_path / "a")
    _, untied = import_pyreft(GOLDEN / "generation", tmp_path / "b")
    assert tied[0] == "positions: taken as l1 (give --positions)"
    assert untied[0] == "positions: taken as f1+l1 (give --positions)"
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["positions"] == "f1+l1"


def test_edits_of_different_kinds_become_several_adapters(tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(GOLDEN / "loreft", mixed)
    config = json.loads((mixed / "config.json").read_text())
    other = json.loads((GOLDEN / "nodireft" / "config.json").read_text())
    row, key = other["representations"][0], "layer_2_comp_block_output_unit_pos_nunit_1#0"
    config["representations"].append([2, *row[1:]])
    config["intervention_types"] += other["intervention_types"]
    config["sorted_keys"].append(key)
    (mixed / "config.json").write_text(json.dumps(config))
    shutil.copy(
        GOLDEN / "nodireft" / f"intkey_{other['sorted_keys'][0]}.safetensors", mixed / f"intkey_{key}.safetensors"
    )
    written, _ = import_pyreft(mixed, tmp_path / "out")
    methods = [json.loads((folder / "adapter_config.json").read_text())["method"] for folder in written]
    assert methods == ["loreft", "direft"]


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(GOLDEN / "loreft", bad)
    (file,) = bad.glob("*.bin")

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Trap()}, file, pickle_module=pickle)
    with pytest.raises(ReftuneError, match="cannot be read as tensors"):
        read_pyreft(bad)
    assert not (tmp_path / "ran").exists()


def _changed(source: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(ReftuneError, match="no config.json of pyreft"):
        read_pyreft(tmp_path)
    with pytest.raises(ReftuneError, match="pyreft's six are LoreftIntervention"):
        read_pyreft(_changed(GOLDEN / "loreft", tmp_path / "a", intervention_types=["<class 'mine.Other'>"]))
    with pytest.raises(ReftuneError, match="the file of layer_9.* is missing"):
        read_pyreft(_changed(GOLDEN / "loreft", tmp_path / "b", sorted_keys=["layer_9_comp_x#0"]))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text("{}")
    with pytest.raises(ReftuneError, match="not a configuration that pyreft saved"):
        read_pyreft(tmp_path / "c")


def test_a_tensor_of_another_intervention_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(GOLDEN / "nodireft", folder)
    (file,) = folder.glob("*.safetensors")
    save_file({**load_file(file), "gate": torch.ones(2)}, file)
    with pytest.raises(ReftuneError, match="holds 'gate'"):
        read_pyreft(folder)
