"""The page as a judge has it: a real Chromium without a window, its keys pressed, closed and opened again."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlparse

import pytest
from chromium import NEEDS_CHROMIUM, chromium
from judging_helpers import answering, program, save_groups, session_of

from diffalign.judging.command import Place, following

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

PROMPTS = ["a red circle", "two blue squares", "a green cross", "three yellow circles"]

pytestmark = [pytest.mark.slow, NEEDS_CHROMIUM]


class Page:
    """A window of the browser with the page in it."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str, judge: str) -> None:
        """Goes to the page and says a name."""
        self.driver.get(url)
        self.driver.find_element("id", "judge").send_keys(judge, Keys.ENTER)

    def part(self, name: str) -> WebElement:
        return self.driver.find_element("id", name)

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def until(self, said: Callable[[], object], seconds: float = 20) -> None:
        """Waits until something is so; the page does all that it does in a moment."""
        gone = (NoSuchElementException, StaleElementReferenceException)
        WebDriverWait(self.driver, seconds, 0.05, gone).until(lambda _: said())

    def at(self, progress: str) -> None:
        """Waits for a progress, and for the pictures to be there and ready to be chosen."""
        self.until(lambda: self.part("progress").text == progress)
        self.until(lambda: self.part("pictures").get_attribute("aria-busy") == "false")

    @property
    def tiles(self) -> list[WebElement]:
        return self.driver.find_elements("class name", "picture")

    @property
    def shown(self) -> list[str]:
        """The hashes of the pictures, by place."""
        script = "return [...document.querySelectorAll('.picture img')].map(image => image.src)"
        return [urlparse(source).path.rpartition("/")[2] for source in self.driver.execute_script(script)]


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    with chromium(profile) as driver:
        yield Page(driver)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_groups(tmp_path / "pictures", PROMPTS)


def test_the_page_of_a_run_waits_and_shows_what_is_drawn_next(tmp_path: Path) -> None:
    run = tmp_path / "people"
    run.mkdir()
    with answering(following(Place(str(run)), 0)) as url, browser(tmp_path / "profile") as page:
        page.open(url, "Ada")
        page.until(lambda: page.part("over").text == "Waiting for the next pictures")
        for number, (name, ask) in enumerate((("x", "best"), ("y", "order")), 1):
            Place(str(save_groups(run / name, PROMPTS[number : number + 1], first=60 * number)), ask=ask).open()
            page.at(f"{number - 1} of {number}")
            assert page.part("prompt").text == PROMPTS[number]
            assert ("Then the next best" in page.part("ask").text) == (ask == "order")
            page.press("1")
            if ask == "order":
                page.press("2")
            page.until(lambda: page.part("over").is_displayed())
        page.until(lambda: page.part("progress").text == "2 of 2")
        assert page.part("over").text == "Waiting for the next pictures"
        page.press("u")
        page.at("1 of 2")
        assert page.part("prompt").text == PROMPTS[2]


def test_judging_with_keys_undoing_closing_everything_and_going_on(folder: Path, tmp_path: Path) -> None:
    session = session_of(folder)
    with program(folder) as (process, url):
        with browser(tmp_path / "first") as page:
            page.open(url, "Ada")
            page.at("0 of 4")
            assert page.part("prompt").text == PROMPTS[0]
            assert "Ada" in page.driver.find_element("tag name", "header").text
            first = page.shown
            assert first == session.groups[0].shuffled("Ada", 0)
            labels = [tile.get_attribute("aria-label") for tile in page.tiles]
            assert labels == ["Picture 1", "Picture 2", "Picture 3"]
            page.press(Keys.ARROW_LEFT, Keys.ARROW_RIGHT, Keys.SPACE, Keys.ENTER, "9", "x", Keys.F2)
            page.press("2")
            page.at("1 of 4")
            page.press("t")
            page.at("2 of 4")
            assert [(c.verdict, c.picks) for c in session.store.choices()] == [("chosen", (first[1],)), ("tie", ())]
            page.press("u")
            page.at("1 of 4")
            assert page.part("prompt").text == PROMPTS[1]
            page.press(Keys.BACKSPACE)
            page.at("0 of 4")
            assert page.part("prompt").text == PROMPTS[0] and page.shown == first and session.store.choices() == []
            page.tiles[2].click()
            page.at("1 of 4")
            page.press("s")
            page.at("2 of 4")
            said = session.store.choices()
            assert [(c.verdict, c.picks) for c in said] == [("chosen", (first[2],)), ("skip", ())]
            assert not [line for line in page.driver.get_log("browser") if line["level"] == "SEVERE"]
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert json.loads(out)["judges"] == {"Ada": {"chosen": 1, "ties": 0, "skipped": 1}}
    with program(folder) as (_, url), browser(tmp_path / "second") as page:
        page.open(url, "Ada")
        page.at("2 of 4")
        assert page.part("prompt").text == PROMPTS[2]
        page.press("1")
        page.at("3 of 4")
        page.press("0")
        page.until(lambda: "All 4 are judged" in page.part("done").text)
        assert "2 chosen, 1 tie, 1 skipped" in page.part("done").text and "--export" in page.part("done").text
        page.part("retake").click()
        page.at("3 of 4")
        assert page.part("prompt").text == PROMPTS[1]
        page.open(url, "Bob")
        page.at("0 of 4")
        assert page.part("prompt").text == PROMPTS[0]


def test_an_answer_that_was_not_saved_is_said_to_be_lost_and_can_be_given_again(folder: Path, tmp_path: Path) -> None:
    session = session_of(folder)
    with browser(tmp_path / "profile") as page:
        with program(folder) as (process, url):
            page.open(url, "Ada")
            page.at("0 of 4")
            page.press("1")
            page.at("1 of 4")
            process.kill()
            process.wait()
            page.press("1")
            page.until(lambda: "Not saved: the server does not answer" in page.part("said").text)
        with program(folder, port=int(url.rpartition(":")[2])):
            page.until(lambda: page.part("pictures").get_attribute("aria-busy") == "false")
            page.press("1")
            page.at("2 of 4")
    assert len(session.store.choices("Ada")) == 2


def test_two_windows_of_one_judge_count_once(folder: Path, tmp_path: Path) -> None:
    session = session_of(folder)
    with answering(session) as url, browser(tmp_path / "profile") as page:
        page.open(url, "Ada")
        page.at("0 of 4")
        one = page.driver.current_window_handle
        page.driver.switch_to.new_window("tab")
        page.open(url, "Ada")
        page.at("0 of 4")
        page.press("1")
        page.at("1 of 4")
        page.driver.switch_to.window(one)
        page.driver.execute_cdp_cmd("Page.bringToFront", {})
        page.at("1 of 4")
        page.press("1")
        page.at("2 of 4")
    assert len(session.store.choices()) == 2


def test_an_order_is_chosen_one_by_one_and_taken_back_one_by_one(folder: Path, tmp_path: Path) -> None:
    session = session_of(folder, "order")
    with answering(session, judge="Ada") as url, browser(tmp_path / "profile") as page:
        page.driver.get(url)
        page.at("0 of 4")
        shown = page.shown
        page.press("3", "3")
        page.until(lambda: "1st" in page.part("pictures").text)
        page.press("u", "2", "1")
        page.at("1 of 4")
    [choice] = session.store.choices()
    assert choice.picks == (shown[1], shown[0], shown[2])


def test_a_group_whose_picture_has_gone_cannot_be_chosen_from_but_skipped(folder: Path, tmp_path: Path) -> None:
    session = session_of(folder)
    with answering(session) as url, browser(tmp_path / "profile") as page:
        (folder / "00001.png").unlink()
        page.open(url, "Ada")
        page.until(lambda: "cannot be shown: skip the group" in page.part("pictures").text)
        page.press("1", "t")
        page.press("s")
        page.at("1 of 4")
    assert [choice.verdict for choice in session.store.choices()] == ["skip"]


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 760), (320, 560)])
def test_all_of_a_group_is_seen_at_once_and_nothing_comes_from_elsewhere(
    folder: Path, tmp_path: Path, width: int, height: int
) -> None:
    session = session_of(save_groups(folder, PROMPTS, each=7))
    with answering(session, judge="Ada") as url, browser(tmp_path / "profile") as page:
        device = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
        page.driver.get(url)
        page.at("0 of 4")
        seen = page.driver.execute_script(
            "return {over: [document.documentElement.scrollWidth - innerWidth, document.documentElement.scrollHeight - "
            "innerHeight], broken: [...document.images].filter(image => !image.naturalWidth).length, sides: "
            "[...document.images].map(image => image.width), from: performance.getEntriesByType('resource').map(entry "
            "=> new URL(entry.name).origin)}"
        )
        assert max(seen["over"]) <= 0 and seen["broken"] == 0 and len(seen["sides"]) == 7
        assert min(seen["sides"]) >= 80 and set(seen["from"]) == {url}
