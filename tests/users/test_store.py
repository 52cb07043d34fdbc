"""The store of users: what goes in comes out bit for bit, and nothing that was saved is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import reftune
from reftune.adapter.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from reftune.errors import ReftuneError
from reftune.users.names import check_user_name
from reftune.users.store import UserStore
from tests.serving.adapters import save_adapter
from tests.tiny_models import CAUSAL, HIDDEN

KEY = "base_model.model.model.layers.{}.intervention.reft_edits.{}"
CONFIG = {
    **{"peft_type": "REFT", "method": "loreft", "r": 2, "layers_to_transform": [0, 2], "component": "block_output"},
    **{"positions": "l1", "share_weights": True, "act_fn": None, "task_type": "CAUSAL_LM"},
}
SHAPES = {"rotation": (2, HIDDEN), "weight": (2, HIDDEN), "bias": (2,)}


def edit(seed: int, names=tuple(SHAPES), dtype=torch.float32) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return {KEY.format(i, name): torch.randn(SHAPES[name], generator=drawn).to(dtype) for i in (0, 2) for name in names}


def same(found, expected) -> bool:
    return found.keys() == expected.keys() and all(
        found[key].dtype == tensor.dtype and torch.equal(found[key], tensor) for key, tensor in expected.items()
    )


@pytest.fixture()
def store(tmp_path) -> UserStore:
    return UserStore.create(tmp_path / "store", CONFIG, "tiny")


def test_what_was_written_is_read_bit_for_bit_in_every_dtype(store) -> None:
    dtypes = torch.float32, torch.float16, torch.bfloat16, torch.float64
    users = {f"user {i}": edit(i, dtype=dtype) for i, dtype in enumerate(dtypes * 3)}
    store.write(users)
    assert UserStore.open(store.path).names() == sorted(users)
    assert all(same(UserStore.open(store.path).read(name), tensors) for name, tensors in users.items())
    assert store.verify() == []


def test_a_shard_is_an_ordinary_safetensors_file_whose_rows_are_users(store) -> None:
    store.write({"anna": edit(1), "bob": edit(2)})
    (shard,) = store.path.glob("*.safetensors")
    stacked = load_file(shard)
    assert same({key: tensor[1] for key, tensor in stacked.items()}, edit(2))


def test_users_are_replaced_and_deleted_by_themselves(store) -> None:
    store.write({"anna": edit(1), "bob": edit(2)})
    digests = store.digest("anna"), store.digest("bob")
    store.write({"anna": edit(3), "carl": edit(4)})
    assert same(store.read("anna"), edit(3)) and same(store.read("bob"), edit(2)) and same(store.read("carl"), edit(4))
    assert store.digest("anna") != digests[0] and store.digest("bob") == digests[1]
    store.delete("bob")
    assert store.names() == ["anna", "carl"] and "bob" not in store and len(store) == 2
    with pytest.raises(ReftuneError, match="no user 'bob'"):
        store.read("bob")
    with pytest.raises(ReftuneError, match="no user 'bob'"):
        store.delete("anna", "bob")
    assert "anna" in store


def test_a_store_open_elsewhere_sees_what_is_written_and_moved(store) -> None:
    other = UserStore.open(store.path)
    for turn in range(40):
        store.write({f"user {i}": edit(100 * turn + i) for i in range(8)})
        assert same(other.read("user 3"), edit(100 * turn + 3))
    assert other.verify() == []


def test_files_stay_small_when_users_are_replaced_again_and_again(store) -> None:
    users = {f"user {i}": edit(i) for i in range(70)}
    for _ in range(6):
        store.write(users)
    store.write({"user 5": edit(77)})
    rows = sum(next(iter(load_file(path).values())).shape[0] for path in store.path.glob("*.safetensors"))
    assert rows <= 4 * len(users)
    assert same(store.read("user 5"), edit(77)) and same(store.read("user 69"), edit(69))
    store.delete(*list(users)[1:])
    assert same(store.read("user 0"), edit(0)) and store.verify() == []
    assert len(list(store.path.glob("*.safetensors"))) == 1


def test_a_write_that_is_refused_changes_nothing(store) -> None:
    store.write({"anna": edit(1)})
    held = sorted((path.name, path.read_bytes()) for path in store.path.glob("*.s*"))
    wide = {key: torch.zeros(*tensor.shape[:-1], HIDDEN + 1) for key, tensor in edit(2).items()}
    broken = edit(3)
    broken[KEY.format(2, "bias")][0] = torch.nan
    refused = {
        "carl.*shape": wide,
        "'carl'.* not finite": broken,
        "no such tensor": {k: t for k, t in edit(4).items() if "bias" not in k},
        "int64": {key: tensor.long() for key, tensor in edit(5).items()},
    }
    for words, tensors in refused.items():
        with pytest.raises(ReftuneError, match=words):
            store.write({"anna": edit(9), "carl": tensors})
        assert sorted((path.name, path.read_bytes()) for path in store.path.glob("*.s*")) == held
    assert same(store.read("anna"), edit(1)) and store.names() == ["anna"]


def test_stacked_tensors_are_written_as_users(store) -> None:
    stacked = {key: torch.stack([edit(seed)[key] for seed in (1, 2, 3)]) for key in edit(1)}
    store.write_stacked(["c", "a", "b"], stacked)
    assert same(store.read("a"), edit(2)) and same(store.read("c"), edit(1))
    with pytest.raises(ReftuneError, match="'a' is written twice"):
        store.write_stacked(["a", "b", "a"], stacked)
    with pytest.raises(ReftuneError, match="for 2 users"):
        store.write_stacked(["a", "b"], stacked)


# The shared part


def test_a_shared_part_is_kept_once_and_joined_to_each_users_own(store) -> None:
    shared = edit(0, ("rotation", "weight"))
    store.write_shared(shared)
    store.write({"anna": edit(1, ("bias",)), "bob": {**shared, **edit(2, ("bias",))}})
    assert same(store.read("anna"), {**shared, **edit(1, ("bias",))})
    assert same(store.read("bob"), {**shared, **edit(2, ("bias",))})
    store.read("anna")[KEY.format(0, "rotation")].zero_()
    assert same(store.read("anna"), {**shared, **edit(1, ("bias",))})
    store.write_shared(shared)
    with pytest.raises(ReftuneError, match="has users already"):
        store.write_shared(edit(5, ("rotation", "weight")))
    with pytest.raises(ReftuneError, match="not that of the store's shared part"):
        store.write({"carl": edit(3)})
    with pytest.raises(ReftuneError, match="nothing but the shared part"):
        store.write({"carl": shared})
    assert store.verify() == [] and store.has_shared


def test_a_user_without_the_shared_part_is_refused_where_there_is_none(store) -> None:
    with pytest.raises(ReftuneError, match="nothing for rotation|nothing for weight"):
        store.write({"anna": edit(1, ("bias",))})


# Folders


@pytest.fixture(scope="module")
def llama():
    return CAUSAL["llama"]()


def saved_folder(model, folder: Path, **settings) -> Path:
    save_adapter(model, folder, **settings)
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "base_model_name_or_path": "tiny"}))
    return folder


def test_an_exported_user_is_the_folder_that_was_imported_and_peft_loads_it_bit_for_bit(llama, tmp_path) -> None:
    folders = {n: saved_folder(llama, tmp_path / n, seed=i, r=2) for i, n in enumerate(("anna", "bob"))}
    config = json.loads((folders["anna"] / CONFIG_FILE).read_text())
    store = UserStore.create(tmp_path / "store", config, "tiny")
    for name, folder in folders.items():
        store.import_folder(folder, name)
    for name, folder in folders.items():
        store.export(name, tmp_path / "out" / name)
        assert same(load_file(tmp_path / "out" / name / WEIGHTS_FILE), load_file(folder / WEIGHTS_FILE))
        written = json.loads((tmp_path / "out" / name / CONFIG_FILE).read_text())
        assert written == {k: v for k, v in config.items() if k in written} and written.keys() >= CONFIG.keys()
        states = []
        for path in (folder, tmp_path / "out" / name):
            model = PeftModel.from_pretrained(llama, str(path))
            states.append({k: t.clone() for k, t in model.state_dict().items() if "reft_" in k})
            model.unload()
        assert states[0] and same(*states)
    with pytest.raises(ReftuneError, match="holds files"):
        store.export("anna", tmp_path / "out" / "bob")


def test_a_folder_of_another_configuration_is_refused_with_what_differs(llama, tmp_path) -> None:
    folder = saved_folder(llama, tmp_path / "one", r=2)
    config = json.loads((folder / CONFIG_FILE).read_text())
    store = UserStore.create(tmp_path / "store", config, "tiny")
    other = saved_folder(llama, tmp_path / "other", r=3, positions="f2")
    with pytest.raises(ReftuneError, match="positions='f2', not 'l1'; r=3, not 2"):
        store.import_folder(other, "anna")
    with pytest.raises(ReftuneError, match="base"):
        UserStore.create(tmp_path / "second", config, "another").import_folder(folder, "anna")


def test_a_config_of_this_library_makes_a_store(tmp_path) -> None:
    config = reftune.ReftConfig(r=2, layers_to_transform=[0, 2]).to_dict()
    store = UserStore.create(tmp_path / "store", config, "tiny")
    store.write({"anna": edit(1)})
    assert store.config["method"] == "loreft" and store.config["base_model_name_or_path"] == "tiny"
    with pytest.raises(ReftuneError, match="a store already"):
        UserStore.create(store.path, config, "tiny")
    with pytest.raises(ReftuneError, match="modules_to_save"):
        UserStore.create(tmp_path / "s", {**CONFIG, "modules_to_save": ["lm_head"]}, "tiny")


# Names


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", "a\nb", "a\0b", "a" * 129, "é" * 128 + "x", "\u202ebob", "e\u0301", " a",
             "a ", "a.", "__base__", "\ud800", "日" * 90]
)  # fmt: skip
def test_names_that_are_none_are_refused(store, name) -> None:
    with pytest.raises(ReftuneError, match="user"):
        store.write({name: edit(1)})
    with pytest.raises(ReftuneError, match="user"):
        store.read(name)
    assert name not in store and store.names() == []


@pytest.mark.parametrize("name", [7, None, b"anna"])
def test_a_name_is_text(name) -> None:
    with pytest.raises(ReftuneError, match="a name is text"):
        check_user_name(name)


def test_names_of_people_and_of_machines_are_names() -> None:
    for name in ("anna", "Anna", "a+b@example.org", "7", "é", "日本", "a b", "550e8400-e29b-41d4", "emoji 😀"):
        assert check_user_name(name) == name


# Several at once, and death


def test_writers_at_once_wait_for_one_another(store) -> None:
    def write(place: int) -> None:
        mine = UserStore.open(store.path)
        for turn in range(10):
            mine.write({f"{place} {turn}": edit(100 * place + turn), "both": edit(1)})

    threads = [threading.Thread(target=write, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store) == 31 and store.verify() == []
    assert all(same(store.read(f"{p} {t}"), edit(100 * p + t)) for p in range(3) for t in range(10))


KILLED = """
import sys
import reftune_command  # so that importing reftune is quick
import torch
from reftune.users.store import UserStore
store = UserStore.open(sys.argv[1])
tensors = store.read("user 0")
for turn in range(10000):
    store.write({f"user {i}": {key: torch.full_like(value, turn) for key, value in tensors.items()} for i in range(20)})
    print(turn, flush=True)
"""


def test_a_killed_writer_loses_nothing_that_was_saved(store) -> None:
    store.write({f"user {i}": edit(i) for i in range(20)})
    environment = {**os.environ, "PYTHONPATH": str(Path(reftune.__file__).parents[1])}
    command = [sys.executable, "-c", KILLED, str(store.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        saved = -1
        for line in process.stdout:
            if (saved := int(line)) == 12:
                process.send_signal(signal.SIGKILL)
    assert UserStore.open(store.path).verify() == []
    found = {float(tensor.mean()) for i in range(20) for tensor in store.read(f"user {i}").values()}
    assert found in ({saved}, {saved + 1})
    store.write({"after": edit(5)})
    assert same(store.read("after"), edit(5)) and store.verify() == []
