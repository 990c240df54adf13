"""The search page in a real browser, headless Chromium: what a user types, drops and clicks, and what then shows.

Screenshots are written to the directory of the test (`pytest --basetemp`), to be looked at.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.data_files import SHARED
from tests.search_kit import Running, SearchKit, build_search_kit, photo, running
from tests.training_kit import records

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
MISSING = [name for name in ("starlette", "uvicorn", "selenium") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} are not installed (llm2clip[app,browser])"),
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no Chromium with chromedriver (Debian: chromium-driver)"
    ),
]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--window-size=1280,900",
)  # fmt: skip


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> SearchKit:
    return build_search_kit(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def server(kit: SearchKit) -> Iterator[Running]:
    with running(kit.settings(images=[str(kit.shard), str(kit.photos)])) as server:
        yield server


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


class Page:
    """The page, as a user sees it."""

    def __init__(self, browser: Any, url: str) -> None:
        self.browser = browser
        browser.get("about:blank")
        browser.get(url)
        self.until(lambda: self.all("body[data-ready]"), "the page is ready")

    def all(self, selector: str) -> list[Any]:
        return list(self.browser.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        ignored = [StaleElementReferenceException]  # results that were replaced while they were looked at
        return WebDriverWait(self.browser, 60, 0.05, ignored).until(lambda _: condition(), f"never: {what}")

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self.all(selector)]

    def items(self, column: int = 0) -> list[int]:
        columns = self.all(".images")
        cards = columns[column].find_elements("css selector", ".card") if columns else []
        return [int(card.get_attribute("data-item")) for card in cards]

    def pictures_shown(self) -> bool:
        return bool(
            self.browser.execute_script(
                "const all = [...document.querySelectorAll('.card img')].slice(0, 8);"
                "return all.length > 0 && all.every((image) => image.complete && image.naturalWidth > 0)"
            )
        )

    def problems(self) -> list[str]:
        return [line["message"] for line in self.browser.get_log("browser") if line["level"] == "SEVERE"]


@pytest.fixture
def page(chromium: Any, server: Running) -> Iterator[Page]:
    page = Page(chromium, server.url)
    page.problems()
    yield page
    assert page.problems() == [], "the console shows errors"


def test_a_typed_query_shows_images_with_scores(page: Page, server: Running, tmp_path: Path) -> None:
    text = records(12)[4]["description"]
    page.one("#text-0").send_keys(text)
    assert page.one("#count-0").text == f"{len(text.split())} words"
    page.one("#go").click()
    page.until(page.pictures_shown, "pictures of the results")
    expected = server.search(text, 24).json
    assert page.items() == [one["item"] for one in expected["images"]] and len(page.items()) == 22
    shown = page.texts(".card .line span[title='cosine similarity']")
    assert shown == [f"{one['score']:.3f}" for one in expected["images"]]
    assert page.texts(".card .caption")[0] == (
        expected["images"][0]["caption"] or expected["images"][0]["key"]
    )
    assert f"{len(text.split())} words, {expected['query']['tokens']} tokens" in page.one(".column > p").text
    assert page.browser.save_screenshot(str(tmp_path / "results.png"))
    # the address finds it again
    page.browser.refresh()
    page.until(page.pictures_shown, "the same results after a reload")
    assert page.items() == [one["item"] for one in expected["images"]]


def test_enter_searches_and_shift_enter_is_a_new_line(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.one("#text-0").send_keys("one", Keys.SHIFT, Keys.ENTER, Keys.NULL, "two")
    assert page.one("#text-0").get_attribute("value") == "one\ntwo" and not page.all(".card")
    page.one("#text-0").send_keys(Keys.ENTER)
    page.until(lambda: page.all(".card"), "results")


def test_short_against_long_side_by_side(page: Page, server: Running, tmp_path: Path) -> None:
    short, long = records(12)[2]["name"], records(12)[2]["description"]
    page.one("#compare").click()
    page.one("#text-0").send_keys(short)
    page.one("#text-1").send_keys(long)
    page.one("#go").click()
    page.until(lambda: len(page.all(".column")) == 2 and page.pictures_shown(), "two columns")
    for column, text in enumerate((short, long)):
        assert page.items(column) == [one["item"] for one in server.search(text, 24).json["images"]]
    # every image is found by both here; each says its place on the other side
    assert "22 of 22 in both" in page.one(".column > p").text
    first = page.items(0)[0]
    assert page.one(".column .card .also").text == f"#{page.items(1).index(first) + 1} there"
    page.browser.save_screenshot(str(tmp_path / "compare.png"))


def test_an_image_finds_captions_and_images(page: Page, tmp_path: Path, kit: SearchKit) -> None:
    photo(7).save(tmp_path / "mine.png")
    page.one("#file").send_keys(str(tmp_path / "mine.png"))
    page.until(lambda: page.all(".texts li") and page.pictures_shown(), "captions and pictures")
    assert len(page.all(".texts li")) == 12 and page.one(".images > h2").text == "Images like mine.png"
    best = page.texts(".card .caption")[0]
    assert best.endswith("photo-007.jpg")
    assert page.one(".chosen img").is_displayed()
    page.browser.save_screenshot(str(tmp_path / "image.png"))
    caption = page.one(".texts li span").text
    page.one(".texts li button").click()
    page.until(lambda: not page.all(".texts li"), "results of the caption")
    assert page.one("#text-0").get_attribute("value") == caption
    assert not page.one(".chosen").is_displayed()


def test_a_dropped_and_a_pasted_image(page: Page) -> None:
    script = """
        const make = async () => {
          const canvas = new OffscreenCanvas(20, 12);
          canvas.getContext('2d').fillRect(0, 0, 20, 12);
          const file = new File([await canvas.convertToBlob()], arguments[0] + '.png', {type: 'image/png'});
          const data = new DataTransfer();
          data.items.add(file);
          const event = arguments[0] === 'drop'
            ? new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})
            : new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true});
          document.body.dispatchEvent(event);
        };
        make();
    """

    def shown(expected: list[str]) -> bool:
        return page.texts(".column > h2") == expected

    for how in ("drop", "paste"):
        page.browser.execute_script(script, how)
        expected = ["Captions", f"Images like {how}.png"]
        page.until(partial(shown, expected), f"results of the {how}")
        assert len(page.all(".texts li")) == 12


def test_an_image_in_detail_and_its_neighbours(page: Page, server: Running, tmp_path: Path) -> None:
    page.one("#text-0").send_keys("an iron key")
    page.one("#go").click()
    page.until(page.pictures_shown, "results")
    item = next(item for item in page.items() if item < 12)
    page.one(f".card[data-item='{item}']").click()
    page.until(lambda: records(12)[item]["description"] in page.texts("#detail-captions dd"), "its captions")
    assert page.one("#detail").is_displayed()
    page.until(lambda: int(page.one("#detail-image").get_property("naturalWidth")) > 0, "the picture")
    page.browser.save_screenshot(str(tmp_path / "detail.png"))
    page.one("#detail-compare").click()
    page.until(lambda: len(page.all(".column")) == 2, "its captions side by side")
    assert not page.one("#detail").is_displayed()
    page.one(f".card[data-item='{item}']").click()
    page.until(lambda: page.one("#detail").is_displayed(), "the picture again")
    page.one("#detail-similar").click()
    page.until(lambda: page.all(".texts li") and page.items()[:1] == [item], "similar images")


def test_what_goes_wrong_is_said(page: Page, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    page.one("#go").click()
    assert page.one("#message").text == "Type a text or choose an image first."

    def broken(texts: list[str]) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(server.service.model.encoder, "encode_texts", broken)
    page.one("#text-0").send_keys("a text that fails")
    page.one("#go").click()
    page.until(lambda: "Refused: the search failed" in page.one("#message").text, "the message")
    assert page.one("#go").is_enabled()
    monkeypatch.undo()
    page.one("#go").click()
    page.until(page.pictures_shown, "results")
    assert not page.one("#message").is_displayed()
    assert len(page.problems()) == 1, "the refused request alone"


def test_markup_in_captions_stays_text(chromium: Any, kit: SearchKit, tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    folder.mkdir()
    photo(1).save(folder / "<b>bold<b>.png")
    (folder / "captions.jsonl").write_text(
        '{"image": "<b>bold<b>.png", "caption": "<script>window.hit = 1</script><i id=markup>text</i>"}\n'
    )
    with running(kit.settings(images=[str(folder)], index=str(tmp_path / "index"))) as server:
        page = Page(chromium, server.url)
        page.one("#text-0").send_keys("<img src=x onerror='window.hit = 1'>")
        page.one("#go").click()
        page.until(lambda: page.all(".card"), "results")
        page.one(".card").click()
        page.until(lambda: page.texts("#detail-captions dd"), "captions")
        assert page.texts("#detail-captions dd") == ["<script>window.hit = 1</script><i id=markup>text</i>"]
        assert not page.all("#markup") and page.browser.execute_script("return window.hit") is None


@pytest.mark.parametrize("width", [1280, 420])
def test_nothing_is_wider_than_the_window(page: Page, width: int, tmp_path: Path) -> None:
    page.browser.set_window_size(max(width, 500), 900)
    try:
        page.one("#text-0").send_keys("a fast car with a very long description " * 30)
        page.one("#go").click()
        page.until(page.pictures_shown, "results")
        assert page.browser.execute_script(
            "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )
        page.browser.save_screenshot(str(tmp_path / f"width-{width}.png"))
    finally:
        page.browser.set_window_size(1280, 900)


@pytest.mark.skipif(not (SHARED / "openstax").is_dir(), reason="the OpenStax shards are not there")
def test_real_pictures(chromium: Any, kit: SearchKit, tmp_path: Path) -> None:
    """Textbook figures with captions and long descriptions; the model knows nothing, the page shows all the same."""
    images = str(SHARED / "openstax" / "openstax-val-000000.tar")
    with running(
        kit.settings(
            images=[images],
            index=str(tmp_path / "index"),
            llm={"path": str(kit.root / "llm")},
            caption_limit=50,
        )
    ) as server:
        page = Page(chromium, server.url)
        page.one("#examples .chip:last-child").click()
        page.until(lambda: len(page.all(".column")) == 2 and page.pictures_shown(), "two columns")
        assert len(page.items(0)) == len(page.items(1)) == 24
        page.browser.save_screenshot(str(tmp_path / "openstax.png"))
