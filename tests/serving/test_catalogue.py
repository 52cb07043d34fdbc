import os
import time
from pathlib import Path

import pytest
import torch

from reftune.errors import ReftuneError
from reftune.serving import catalogue
from reftune.serving.bank import Bank
from reftune.serving.catalogue import Catalogue, is_name, refuse_links_out
from reftune.users.names import INDEX_FILE
from tests.users.test_hostile import make_store
from tests.users.test_store import edit


def adapter(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}", encoding="utf-8")
    return path


def test_adapters_are_the_folders_one_level_down_or_the_folder_itself(tmp_path: Path) -> None:
    for name in ("a", "b", ".hidden", "none"):
        (adapter if name != "none" else Path.mkdir)(tmp_path / "many" / name)
    single = adapter(tmp_path / "single")
    adapter(tmp_path / "many" / "none" / "too-deep")
    assert Catalogue([tmp_path / "many", single]).names() == ["a", "b", "single"]


def test_a_new_or_deleted_folder_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter(tmp_path / "a")
    monkeypatch.setattr("reftune.serving.catalogue._LOOK_AGAIN", 0.0)
    catalogue = Catalogue([tmp_path])
    adapter(tmp_path / "b")
    assert catalogue.names() == ["a", "b"]
    (tmp_path / "a" / "adapter_config.json").unlink()
    assert catalogue.folder("a") is None and catalogue.folder("b") == tmp_path / "b"


def test_links_that_lead_out_are_not_followed(tmp_path: Path) -> None:
    outside, inside = adapter(tmp_path / "outside" / "secret"), adapter(tmp_path / "served" / "a")
    (tmp_path / "served" / "link-out").symlink_to(outside)
    (tmp_path / "served" / "link-in").symlink_to(inside)
    catalogue = Catalogue([tmp_path / "served"])
    assert catalogue.names() == ["a", "link-in"]
    with pytest.raises(ReftuneError, match="no adapter of that path"):
        catalogue.add("x", outside)
    with pytest.raises(ReftuneError, match="no adapter of that path"):
        catalogue.add("x", "link-out")


def test_a_file_that_is_a_link_out_is_refused_and_one_inside_is_not(tmp_path: Path) -> None:
    (tmp_path / "secret.jinja").write_text("secret", encoding="utf-8")
    roots = [tmp_path / "served"]
    one, other = (adapter(roots[0] / name) for name in ("one", "other"))
    (one / "run.yaml").symlink_to(other / "adapter_config.json")
    refuse_links_out(one, roots)
    (one / "chat_template.jinja").symlink_to(tmp_path / "secret.jinja")
    with pytest.raises(ReftuneError, match="chat_template.jinja is a link out"):
        refuse_links_out(one, roots)
    with pytest.raises(ReftuneError, match="is a link out"):
        Catalogue(roots).add("third", "one")
    store = make_store(tmp_path).path
    refuse_links_out(store / "anna", [store])
    (store / "run.yaml").symlink_to(tmp_path / "secret.jinja")
    with pytest.raises(ReftuneError, match="run.yaml is a link out"):
        refuse_links_out(store / "anna", [store])


def test_a_folder_without_links_is_looked_through_once_and_a_link_put_in_later_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Path] = []
    look = catalogue.refuse_links_out
    monkeypatch.setattr(catalogue, "refuse_links_out", lambda *given: looked.append(given[0]) or look(*given))
    one = adapter(tmp_path / "served" / "one")
    served = Catalogue([tmp_path / "served"])
    for _ in range(2):  # it has just been written: a second change could have the same time
        served.refuse_links_out(one)
    assert looked == [one] * 2
    later = time.time_ns() + 10**10
    monkeypatch.setattr(catalogue.time, "time_ns", lambda: later)
    os.utime(one, (0, 0))
    for _ in range(3):
        served.refuse_links_out(one)
    assert looked == [one] * 3
    (one / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ReftuneError, match="tokenizer.json is a link out"):
        served.refuse_links_out(one)
    (one / "tokenizer.json").unlink()
    inside = adapter(tmp_path / "served" / "two")
    (one / "tokenizer.json").symlink_to(inside / "tokenizer.json")
    served.refuse_links_out(one)
    (inside / "tokenizer.json").symlink_to(tmp_path / "secret.json")  # what a link leads to changes without its folder
    with pytest.raises(ReftuneError, match="tokenizer.json is a link out"):
        served.refuse_links_out(one)


def test_a_folder_that_becomes_a_link_out_or_a_store_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = time.time_ns() + 10**10
    monkeypatch.setattr(catalogue.time, "time_ns", lambda: later)
    store = make_store(tmp_path).path
    one, other = adapter(tmp_path / "served" / "one"), adapter(tmp_path / "served" / "other")
    served = Catalogue([tmp_path / "served", store])
    for folder in (one, other, store / "anna"):
        os.utime(folder.parent, (0, 0))
        served.refuse_links_out(folder)
    (store / "run.yaml").symlink_to(tmp_path / "secret.yaml")
    with pytest.raises(ReftuneError, match="run.yaml is a link out"):
        served.refuse_links_out(store / "anna")
    one.rename(tmp_path / "elsewhere")
    one.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ReftuneError, match="one is a link out"):
        served.refuse_links_out(one)
    (tmp_path / "served" / INDEX_FILE).touch()  # now what lies beside the folder would be read in its place
    with pytest.raises(ReftuneError, match="one is a link out"):
        served.refuse_links_out(other)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", "/a", ".a", "a\n", "a\x00", "x" * 129, "C:a", "a*b", " a"]
)
def test_what_is_no_name(name: str, tmp_path: Path) -> None:
    assert not is_name(name)
    adapter(tmp_path / "a")
    catalogue = Catalogue([tmp_path])
    assert catalogue.folder(name) is None
    with pytest.raises(ReftuneError):
        catalogue.add(name, "a")


def test_names_of_any_script(tmp_path: Path) -> None:
    adapter(tmp_path / "お嬢様")
    assert Catalogue([tmp_path]).names() == ["お嬢様"]


def test_two_adapters_of_one_name_and_missing_folders_are_refused(tmp_path: Path) -> None:
    adapter(tmp_path / "one" / "a"), adapter(tmp_path / "two" / "a")
    with pytest.raises(ReftuneError, match="two adapters are called 'a'"):
        Catalogue([tmp_path / "one", tmp_path / "two"])
    with pytest.raises(ReftuneError, match="no such folder"):
        Catalogue([tmp_path / "three"])


def test_ten_thousand_adapters_are_listed_quickly(tmp_path: Path) -> None:
    import time

    for number in range(2000):
        adapter(tmp_path / f"a{number}")
    begin = time.process_time()
    assert len(Catalogue([tmp_path]).names()) == 2000
    assert time.process_time() - begin < 1.0


def test_the_users_of_a_store_are_adapters_beside_folders(tmp_path: Path) -> None:
    store = make_store(tmp_path / "given")
    adapter(tmp_path / "many" / "carl")
    catalogue = Catalogue([store.path, tmp_path / "many"])
    assert catalogue.names() == ["anna", "bob", "carl"] and catalogue.folders == [tmp_path / "many"]
    assert catalogue.folder("anna") == store.path / "anna" and catalogue.folder("zoe") is None
    store.write({"zoe": edit(5)})
    store.delete("bob")
    assert catalogue.names() == ["anna", "carl", "zoe"] and catalogue.folder("bob") is None
    catalogue.remove("anna")
    assert catalogue.names() == ["carl", "zoe"] and catalogue.folder("anna") is None
    with pytest.raises(ReftuneError, match="served already"):
        catalogue.add("zoe", "carl")
    with pytest.raises(ReftuneError, match="no adapter of that path"):
        catalogue.add("new", store.path / "zoe")


def test_a_user_and_another_adapter_of_one_name_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "given")
    adapter(tmp_path / "many" / "anna")
    with pytest.raises(ReftuneError, match="two adapters are called 'anna'"):
        Catalogue([tmp_path / "many", store.path])
    with pytest.raises(ReftuneError, match="two stores have a user 'anna'"):
        Catalogue([store.path, make_store(tmp_path / "more").path])


def test_a_bank_takes_users_and_reads_one_again_who_was_replaced(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.export("anna", tmp_path / "anna")
    bank = Bank()
    bank.add("folder", tmp_path / "anna")
    bank.add("user", store.path / "anna")
    folder, user = bank.take("folder").loaded.adapter, bank.take("user").loaded.adapter
    assert all(torch.equal(one.folded.A, two.folded.A) for one, two in zip(folder.edits, user.edits, strict=True))
    store.write({"bob": edit(7)})
    assert bank.take("user").loaded.adapter is user and bank.loads == 2
    store.write({"anna": edit(8)})
    assert bank.take("user").loaded.adapter.digest != user.digest and bank.loads == 3
    store.delete("anna")
    with pytest.raises(ReftuneError, match="no user 'anna'"):
        bank.take("user")
