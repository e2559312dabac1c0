"""The page of `diffalign noise-demo`: what a search tells it, and how it looks in a real Chromium."""

from __future__ import annotations

import base64
import functools
import io
import json
import threading
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

import pytest
from chromium import NEEDS_CHROMIUM, chromium
from miniatures import stable_diffusion
from PIL import Image

gradio = pytest.importorskip("gradio")
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

from diffalign import cli  # noqa: E402
from diffalign.noise import NOISE_METHODS, app  # noqa: E402
from diffalign.noise.demo import Serving, Settings  # noqa: E402
from diffalign.pipelines import load_pipeline  # noqa: E402
from diffalign.pipelines.base import LatentPipeline  # noqa: E402
from diffalign.rewards import load_rewards  # noqa: E402
from diffalign.rewards.base import Weighted  # noqa: E402

CAPTION = "a red circle above a blue square"


@functools.cache
def pipe() -> LatentPipeline:
    return load_pipeline(stable_diffusion())


@functools.cache
def rewards() -> Weighted:
    return load_rewards({"tiny-clip": 1.0, "jpeg": 0.0})


def search(*, weights: tuple[float, float] = (1.0, 0.0), **how: object) -> list[app.Update]:
    options = {"method": "reno", "sampling_steps": 1, "seed": 0} | how
    return list(app.searched(pipe(), rewards(), CAPTION, weights, options))


def threads() -> int:
    return sum(thread.name == "noise-search" for thread in threading.enumerate())


def test_a_search_shows_what_it_sees_and_then_the_best() -> None:
    *looks, (now, best, curve, text) = search(steps=4)
    assert looks and all(picture.size == (384, 384) for update in (*looks, (now, best)) for picture in update[:2])
    assert list(curve["look"]) == [0, 1, 2, 3] and curve["total"].max() > curve["total"][0]
    assert text.startswith("Done: total ") and "4 evaluations" in text


def test_sliders_are_the_weights_of_this_search_alone() -> None:
    several = [search(method="best_of_n", steps=1, weights=weights) for weights in ((1, 0), (2, 0), (0, 3), (1, 0))]
    first, doubled, other, again = (updates[-1][2]["total"][0] for updates in several)
    assert doubled == pytest.approx(2 * first) and again == first and other not in (0, first)
    assert rewards().weights == {"tiny-clip": 1.0, "jpeg": 0.0}


def test_leaving_the_page_ends_the_search() -> None:
    before = threads()
    updates = app.searched(pipe(), rewards(), CAPTION, (1.0, 0.0), {"method": "best_of_n", "steps": 10**6})
    next(updates)
    assert threads() == before + 1
    updates.close()
    assert threads() == before


@pytest.mark.parametrize(("how", "said"), [({"steps": 0}, "steps"), ({"method": "fk"}, "single step")])
def test_what_is_wrong_is_said_on_the_page(how: dict[str, object], said: str) -> None:
    with pytest.raises(gradio.Error, match=said):
        search(**how)


def test_keywords_of_the_method_are_typed_into_the_page() -> None:
    how = {"method": "reno", "sampling_steps": 1, "steps": 3}
    curves = [list(app.searched(pipe(), rewards(), CAPTION, (1.0, 0.0), how, options))[-1][2]
              for options in ("", "lr=1 regularization=0.5")]  # fmt: skip
    assert curves[0]["total"][0] == curves[1]["total"][0] and curves[0]["total"][2] != curves[1]["total"][2]
    for wrong, said in (("lr", "expected KEY=VALUE"), ("steps=4", "has an option of its own"), ("beta=1", "beta")):
        with pytest.raises(gradio.Error, match=said):
            list(app.searched(pipe(), rewards(), CAPTION, (1.0, 0.0), how, wrong))


@pytest.mark.parametrize("method", NOISE_METHODS)
def test_every_method_gets_the_number_of_looks_if_it_has_one(method: str) -> None:
    assert app.looks(method, 7) == ({} if method in ("paths", "fk") else {"steps": 7})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--method", "rneo"], "did you mean 'reno'"),
        (["--sampling-steps", "0"], "noise-demo.sampling_steps: expected a number above 0, got 0"),
        (["--dtype", "int8"], "expected float32, bfloat16 or float16"),
    ],
)
def test_what_is_refused(more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["noise-demo", "--model", str(stable_diffusion()), "--reward", "tiny-clip", *more])
    assert end.value.code and said in capsys.readouterr().err


@pytest.mark.slow
@NEEDS_CHROMIUM
def test_the_picture_gets_better_in_a_browser_and_nothing_comes_from_another_host(tmp_path: Path) -> None:
    start = Settings("a red circle", method="reno", steps=30)
    page = app.build_app(pipe(), "a small model", rewards(), start)
    url = app.opened(page, Serving())
    try:
        with chromium(tmp_path / "profile") as driver:
            driver.get(url)
            wait = WebDriverWait(driver, 60, 0.1)

            def text() -> str:
                return str(driver.execute_script("return document.querySelector('#said')?.innerText ?? ''"))

            def shown(name: str) -> bytes:
                source = driver.execute_script(f"return document.querySelector('#{name} img')?.src ?? ''")
                if source.startswith("data:"):
                    return base64.b64decode(source.partition(",")[2])
                return urllib.request.urlopen(source).read() if source else b""

            wait.until(lambda _: driver.find_elements("css selector", "#search"))
            box = driver.find_element("css selector", "#prompt textarea")
            assert box.get_attribute("value") == "a red circle"
            box.send_keys(Keys.CONTROL, "a")
            box.send_keys("two blue squares")
            driver.find_element("css selector", "#search").click()
            wait.until(lambda _: "Look" in text())
            early = shown("best")
            wait.until(lambda _: "Done" in text())
            late = shown("best")
            assert Image.open(io.BytesIO(early)).size == Image.open(io.BytesIO(late)).size == (384, 384)
            assert early != late
            before, after = (float(word) for word in text().split("total ")[1].split(" at ")[0].split(" to "))
            assert after > before
            events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
            asked = [urlparse(event["params"]["request"]["url"]) for event in events
                     if event["method"] == "Network.requestWillBeSent"]  # fmt: skip
            assert {one.hostname for one in asked if one.scheme.startswith("http")} == {"127.0.0.1"}

            looks = driver.find_element("css selector", "#looks input[type=number]")
            driver.execute_script("arguments[0].select()", looks)
            looks.send_keys("100000", Keys.TAB)
            driver.find_element("css selector", "#search").click()
            wait.until(lambda _: "Look" in text())
            driver.find_element("css selector", "#stop").click()
            wait.until(lambda _: not any(thread.name == "noise-search" for thread in threading.enumerate()))
            time.sleep(1)  # in which an end that was not stopped would be told
            assert "Done" not in text()
    finally:
        page.close(verbose=False)
