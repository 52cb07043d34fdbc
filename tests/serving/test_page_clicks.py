"""The page in a browser: one server with a tiny model, one headless Chromium, everything that a person clicks."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.tiny_folder import save_tiny_model, write_rows
from tests.serving.test_server import Served
from tests.serving.tiny_adapters import save_adapter

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or "REFTUNE_BROWSER" not in os.environ,
    reason="a browser's clicks: `make test-page`, with Chromium",
)
LOGS = ("#log-base .answer", "#log-edited .answer")
LIGHT, DARK = "rgb(247, 248, 250)", "rgb(17, 24, 39)"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("page")
    save_tiny_model(folder / "model")
    for seed, (name, positions) in enumerate({"last": "l1+generated", "ends": "f2+l2"}.items()):
        save_adapter(folder / "model", folder / "adapters" / name, seed, positions=positions)
    served = Served(folder / "model", folder / "adapters")
    yield served
    assert served.end() == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(server: Served, browser: Any) -> Iterator[Any]:
    """Opens the page; at the end the console must be empty, but for what the test expected."""
    contexts, complaints = [], []

    def open_page(width: int = 1280, scheme: str = "light", refused: bool = False) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        # Chromium itself logs each answer of status 400 and above; the test that provokes one says so
        page.on("console", lambda said: refused and "status of 4" in said.text or complaints.append(said.text))
        page.goto(server.url)
        page.locator("#adapters option").first.wait_for(state="attached")
        page.fill("#longest", "12")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def ask(page: Any, text: str) -> list[str]:
    """Both answers to a prompt, when they are whole."""
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.locator("#send:enabled").wait_for()
    return [page.locator(log).last.text_content() for log in LOGS]


def served_answer(server: Served, **body: Any) -> str:
    return server.text(messages=[{"role": "user", "content": "hi"}], **{"max_tokens": 12, **body})


def test_base_and_adapter_answer_side_by_side(visit: Any, server: Served) -> None:
    page = visit()
    assert page.input_value("#adapter") == "ends"
    page.fill("#adapter", "last")
    found = ask(page, "hi")
    assert found == [served_answer(server, model="model"), served_answer(server, model="last")]
    assert found[0] != found[1] and all(found)
    boxes = [page.locator(log).bounding_box() for log in LOGS]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    ask(page, "and you?")
    assert [page.locator(log).count() for log in LOGS] == [2, 2]
    page.click("#reset")
    assert [page.locator(log).count() for log in LOGS] == [0, 0]
    assert ask(page, "hi") == found  # what was forgotten is not in the prompt


def test_answers_arrive_in_pieces_and_can_be_stopped(visit: Any, server: Served) -> None:
    page = visit()
    page.evaluate(
        """() => { window.lengths = [];
        new MutationObserver(() => window.lengths.push(document.querySelector('#log-edited').textContent.length))
            .observe(document.querySelector('#log-edited'), { childList: true, subtree: true, characterData: true }); }"""
    )
    page.fill("#longest", "40")
    ask(page, "hi")
    lengths = page.evaluate("window.lengths")
    assert len(set(lengths)) > 5 and lengths == sorted(lengths)
    page.evaluate(
        """() => new MutationObserver(() => document.querySelector('#stop').click())
            .observe(document.querySelector('#log-edited'), { subtree: true, characterData: true, childList: true })"""
    )
    page.click("#reset")
    page.fill("#longest", "180")
    stopped = ask(page, "hi")
    assert len(stopped[1]) < len(served_answer(server, model="ends", max_tokens=180))
    assert page.is_hidden("#stop") and page.is_hidden("#trouble")


def test_strength_and_expression_change_the_answer(visit: Any, server: Served) -> None:
    page = visit()
    page.fill("#adapter", "last")
    found = {}
    for strength in ("0", "1", "-2"):
        page.fill("#strength", strength)
        page.click("#reset")
        found[strength] = ask(page, "hi")
        assert found[strength][1] == served_answer(server, model="last", scale=float(strength))
    assert page.text_content("#edited-title") == "last, strength -2.0"
    assert found["0"][0] == found["0"][1] and len({edited for _, edited in found.values()}) > 1
    page.fill("#strength", "1")
    page.fill("#adapter", "0.5*last + -2*ends")
    page.click("#reset")
    mixed = ask(page, "hi")[1]
    assert mixed == served_answer(server, model="0.5*last + -2*ends")
    assert mixed not in [edited for _, edited in found.values()]


def test_the_edited_tokens_are_coloured(visit: Any) -> None:
    page = visit()
    page.fill("#adapter", "ends")
    ask(page, "hi")
    page.click("#tokens-box summary")
    tokens = page.locator("#tokens span")
    edited = [index for index in range(tokens.count()) if "edited" in (tokens.nth(index).get_attribute("class") or "")]
    assert edited == [0, 1, tokens.count() - 2, tokens.count() - 1]
    assert page.text_content("#tokens-count") == f"{tokens.count()}, 4 edited"
    colours = [tokens.nth(i).evaluate("token => getComputedStyle(token).backgroundColor") for i in (0, 2)]
    assert colours[0] == "rgb(253, 231, 217)" != colours[1]


def test_an_adapter_is_trained_from_a_file_then_chosen(visit: Any, server: Served, tmp_path: Path) -> None:
    page = visit()
    page.click("#tab-train")
    page.set_input_files("#rows", write_rows(tmp_path / "rows.csv", 4))
    page.fill("#new-name", "mate")
    page.fill("#epochs", "40")
    page.evaluate(
        """() => { window.said = [];
        new MutationObserver(() => window.said.push(document.querySelector('#train-state').textContent))
            .observe(document.querySelector('#train-state'), { childList: true }); }"""
    )
    page.click("#begin")
    page.locator("#train-state", has_text="mate is trained").wait_for(timeout=60_000)
    assert len([line for line in page.evaluate("window.said") if "of 40, loss" in line]) >= 2
    assert len(page.get_attribute("#curve .line", "points").split()) >= 3
    assert page.input_value("#adapter") == "mate"
    assert page.locator("#adapters option[value='mate'], #adapters option:text-is('mate')").count() == 1
    page.click("#tab-chat")
    assert ask(page, "hi")[1] == served_answer(server, model="mate")
    page.click("#tab-train")
    page.set_input_files("#rows", {"name": "x.csv", "mimeType": "text/csv", "buffer": b"a,b\n1,2\n"})
    page.fill("#new-name", "bad")
    page.click("#begin")
    page.locator("#train-state", has_text="Error").wait_for(timeout=60_000)
    assert page.is_enabled("#begin")


def test_look_inside_shows_picture_bars_and_text(visit: Any) -> None:
    page = visit()
    page.click("#tab-look")
    page.fill("#look-name", "last")
    page.press("#look-name", "Enter")
    page.locator("#look-text").wait_for(timeout=60_000)
    assert page.locator("#look-picture").evaluate("image => image.naturalWidth") > 300
    heights = [float(bar.get_attribute("height")) for bar in page.locator("#removal rect").all()]
    assert len(heights) == 2 and max(heights) > 100
    assert "model.layers.0" in page.text_content("#look-text") and "nats" in page.text_content("#look-state")


def test_an_unknown_adapter_is_told_and_the_next_prompt_is_well(visit: Any, server: Served) -> None:
    page = visit(refused=True)
    page.fill("#adapter", "nobody")
    page.fill("#prompt", "hi")
    page.press("#prompt", "Enter")
    page.locator("#trouble", has_text="nobody").wait_for()
    page.locator("#send:enabled").wait_for()
    page.fill("#adapter", "last")
    assert ask(page, "hi")[1] == served_answer(server, model="last")  # the turn without an answer is not in the prompt
    assert page.is_hidden("#trouble")


def test_keys_move_between_tabs_and_shift_enter_makes_a_line(visit: Any) -> None:
    page = visit()
    page.focus("#tab-chat")
    for key, tab in [("ArrowRight", "train"), ("ArrowRight", "look"), ("ArrowRight", "chat"), ("ArrowLeft", "look")]:
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.id") == f"tab-{tab}"
        assert page.locator("[role=tabpanel]:visible").get_attribute("id") == tab
    page.click("#tab-chat")
    page.fill("#prompt", "one")
    page.press("#prompt", "Shift+Enter")
    assert page.input_value("#prompt") == "one\n" and page.locator(".answer").count() == 0


@pytest.mark.parametrize(("scheme", "ground"), [("light", LIGHT), ("dark", DARK)])
def test_every_tab_fits_a_telephone_in_light_and_dark(visit: Any, scheme: str, ground: str) -> None:
    page = visit(390, scheme)
    page.fill("#adapter", "ends" + " + ends" * 30)
    ask(page, "a-very-long-word-" * 6)
    page.click("#tokens-box summary")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    for tab in ("chat", "train", "look"):
        page.click(f"#tab-{tab}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab


def test_pictures_lie_on_the_page_s_own_ground(visit: Any) -> None:
    page = visit(1280, "dark")
    page.click("#tab-look")
    page.fill("#look-name", "last")
    page.click("#looking button")
    page.locator("#look-text:visible").wait_for()
    ground = page.evaluate("getComputedStyle(document.querySelector('#look-figure')).backgroundColor")
    assert ground == page.evaluate("getComputedStyle(document.querySelector('#look-text')).backgroundColor")
    corner = page.evaluate(
        """() => { const image = document.querySelector('#look-picture'), canvas = document.createElement('canvas');
        canvas.getContext('2d').drawImage(image, 0, 0); return [...canvas.getContext('2d').getImageData(1, 1, 1, 1).data]; }"""
    )
    assert corner[3] == 0  # transparent
