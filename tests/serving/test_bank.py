"""The bank: stacked edits against each edit by itself, budgets, reloading and threads."""

from __future__ import annotations

import os
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch

import reftune
from reftune.adapter.checkpoint import WEIGHTS_FILE
from reftune.engine.row_plan import Run
from reftune.serving.bank import Bank, Held
from reftune.serving.folded import read_folded
from tests.serving.adapters import edits_of, save_adapter
from tests.tiny_models import CAUSAL, HIDDEN

SITE = "block_output", "model.layers.1"


@pytest.fixture(scope="module")
def llama():
    return CAUSAL["llama"]()


@pytest.fixture(scope="module")
def folders(llama, tmp_path_factory) -> dict[str, Path]:
    """Adapters of several ranks and kinds; most edit layer 1."""
    root = tmp_path_factory.mktemp("adapters")
    configs = {
        "two": {"r": 2},
        "eight": {"r": 8, "layers_to_transform": [1]},
        "constant": {"method": "lobireft", "r": 1},
        "bent": {"act_fn": "tanh", "layers_to_transform": [1]},
        "untied": {"positions": "f2+l2", "share_weights": False},
        "elsewhere": {"layers_to_transform": [0]},
        "gated": {"method": "gated", "layers_to_transform": [1]},
    }
    return {n: save_adapter(llama, root / n, seed=i, **config) for i, (n, config) in enumerate(configs.items())}


@pytest.fixture()
def bank(folders) -> Bank:
    bank = Bank()
    for name, folder in folders.items():
        bank.add(name, folder)
    return bank


def expected_rows(edit, rows, scale):
    return rows + scale * (edit(rows) - rows)


@pytest.mark.parametrize("length", [1, 2, 40], ids=["one row a run", "two rows a run", "many rows a run"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_are_edited_as_each_adapters_own_edit_does(bank, folders, llama, length: int, dtype) -> None:
    scales = {"two": 1.0, "eight": -0.5, "constant": 2.0, "bent": 0.25, "untied": 1.0, "gated": 0.5, "elsewhere": 1.0}
    hidden = torch.randn(1, len(scales) * (length + 1) + 3, HIDDEN).to(dtype)
    runs, expected = [], hidden.clone()
    for place, (name, scale) in enumerate(scales.items()):
        part = "suffix" if name == "untied" else "both"
        start, stop = place * (length + 1), place * (length + 1) + length
        runs.append(Run(start, stop, bank.take(name, scale), part))
        edit = edits_of(llama, folders[name]).get("model.layers.1" + (":suffix" if part == "suffix" else ""))
        if edit is not None:
            expected[0, start:stop] = expected_rows(edit, hidden[0, start:stop].float(), scale).to(dtype)
    before = hidden.clone()
    edited = bank.edit(SITE, hidden, runs)
    assert torch.equal(hidden, before)
    assert edited.dtype == dtype and edited.shape == hidden.shape
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(edited, expected, rtol=tolerance, atol=tolerance)
    untouched = [row for row in range(hidden.shape[1]) if not any(r.start <= row < r.stop for r in runs[:-1])]
    assert torch.equal(edited[0, untouched], hidden[0, untouched])


def test_a_column_of_the_tensor_may_be_all_that_an_edit_sees(bank, folders, llama) -> None:
    hidden = torch.randn(3, HIDDEN + 5)
    edit = edits_of(llama, folders["eight"])["model.layers.1"]
    runs = [Run(1, 2, bank.take("eight"), "both")]
    for columns in (slice(3, 3 + HIDDEN), [*range(2, 2 + HIDDEN - 1), HIDDEN + 4]):
        expected = hidden.clone()
        expected[1, columns] = edit(hidden[1:2, columns])[0]
        torch.testing.assert_close(bank.edit(SITE, hidden, runs, columns), expected, rtol=1e-5, atol=1e-5)


def test_nothing_to_edit_gives_the_very_same_tensor(bank) -> None:
    hidden = torch.randn(4, HIDDEN)
    assert bank.edit(SITE, hidden, []) is hidden
    assert bank.edit(SITE, hidden, [Run(0, 2, bank.take("elsewhere"), "both")]) is hidden


def test_folders_are_read_when_first_taken_and_kept_within_the_budget(bank, folders) -> None:
    assert bank.loads == 0 and bank.nbytes == 0
    bank.max_adapters = 2
    for name in ("two", "eight", "two", "constant", "two"):
        bank.give_back(bank.take(name))
    assert (bank.loads, bank.evictions, bank.loaded) == (3, 1, ["constant", "two"])
    assert bank.nbytes == sum(read_folded(folders[name]).nbytes for name in bank.loaded)
    bank.max_bytes = read_folded(folders["two"]).nbytes
    bank.give_back(bank.take("two"))
    assert bank.loaded == ["two"]


def test_what_a_request_holds_is_not_thrown_out(bank) -> None:
    bank.max_adapters = 1
    held = [bank.take(name) for name in ("two", "eight", "constant")]
    assert bank.loaded == ["two", "eight", "constant"]
    bank.give_back(held[1])
    assert bank.loaded == ["two", "constant"]


def test_rows_of_the_stacks_are_used_again(bank) -> None:
    bank.max_adapters = 1
    for _ in range(30):
        bank.give_back(bank.take("two"))
        bank.give_back(bank.take("eight"))
    assert bank.stacks[SITE].factors[1].shape == (8, 8)


def test_a_request_keeps_what_it_began_with_when_its_folder_changes(llama, folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["two"], tmp_path / "poet"))
    bank = Bank()
    bank.add("poet", folder)
    hidden = torch.randn(5, HIDDEN)
    old = bank.take("poet")
    before = bank.edit(SITE, hidden, [Run(0, 2, old, "both")])
    shutil.copytree(folders["eight"], folder, dirs_exist_ok=True)
    new = bank.take("poet")
    assert old.key != new.key
    assert torch.equal(bank.edit(SITE, hidden, [Run(0, 2, old, "both")]), before)
    edit = edits_of(llama, folders["eight"])["model.layers.1"]
    after = bank.edit(SITE, hidden, [Run(3, 5, new, "both")])
    torch.testing.assert_close(after[3:], edit(hidden[3:]), rtol=1e-5, atol=1e-5)
    rows = old.loaded.rows
    bank.give_back(old)
    assert rows and not old.loaded.rows and bank.loaded == ["poet"]


def test_files_written_again_with_the_same_content_are_the_same_version(bank, folders) -> None:
    first = bank.take("two")
    os.utime(folders["two"] / WEIGHTS_FILE)
    assert bank.take("two").loaded is first.loaded


def test_a_folder_that_is_being_written_is_served_as_it_was(folders, tmp_path: Path, caplog) -> None:
    folder = Path(shutil.copytree(folders["two"], tmp_path / "poet"))
    bank = Bank()
    bank.add("poet", folder)
    first = bank.take("poet")
    (folder / WEIGHTS_FILE).write_bytes(b"half")
    assert bank.take("poet").loaded is first.loaded
    assert "'poet' has changed on disk and cannot be read" in caplog.text
    shutil.rmtree(folder)
    with pytest.raises(reftune.ReftuneError, match="is not a folder"):
        bank.take("poet")
    assert first.loaded.rows, "a request in flight goes on"


def test_an_unknown_or_removed_name_is_refused(bank) -> None:
    held = bank.take("two")
    bank.remove("two")
    with pytest.raises(reftune.ReftuneError, match="'two' is not in the bank"):
        bank.take("two")
    assert "two" not in bank.names() and held.loaded.rows


def test_the_key_names_weights_and_strength(bank, folders, tmp_path: Path) -> None:
    bank.add("copy", shutil.copytree(folders["two"], tmp_path / "copy"))
    assert bank.take("two").key == bank.take("copy").key
    assert len({bank.take("two").key, bank.take("two", 0.5).key, bank.take("eight").key}) == 3


def test_an_adapter_that_the_check_refuses_is_not_kept(bank) -> None:
    def check(adapter) -> None:
        raise reftune.ReftuneError("no such layer")

    bank.check = check
    with pytest.raises(reftune.ReftuneError, match="no such layer"):
        bank.take("two")
    assert bank.loaded == [] and bank.nbytes == 0


def test_threads_get_their_own_adapters_under_eviction(bank, folders, llama) -> None:
    bank.max_adapters = 1
    names = ["two", "eight", "constant"]
    edits = {name: edits_of(llama, folders[name])["model.layers.1"] for name in names}
    wrong: list[str] = []

    def work(seed: int) -> None:
        choose = random.Random(seed)
        hidden = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(seed))
        for _ in range(40):
            name = choose.choice(names)
            with bank.holding(name) as held, torch.no_grad():
                edited = bank.edit(SITE, hidden, [Run(1, 3, held, "both")])
                if not torch.allclose(edited[1:3], edits[name](hidden[1:3]), atol=1e-5):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and isinstance(bank.take("two"), Held)
    assert bank.evictions > 10
