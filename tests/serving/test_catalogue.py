from pathlib import Path

import pytest
import torch

from reftune.errors import ReftuneError
from reftune.serving.bank import Bank
from reftune.serving.catalogue import Catalogue, is_name, refuse_links_out
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
