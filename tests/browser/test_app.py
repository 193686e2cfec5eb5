# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The web demo in a real browser, headless: what a user clicks, and what a stranger must not get. Screenshots: runs/screenshots."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import build_tokenizer
from deem_fixtures import SIDE, tiny_model
from PIL import Image
from transformers import ConvNextImageProcessorPil

from processing import DeemProcessor

webdriver = pytest.importorskip(
    "selenium.webdriver", reason='the browser is driven by selenium: pip install -e ".[dev]"'
)
pytest.importorskip("gradio", reason='the demo needs gradio: pip install -e ".[demo]"')

from selenium.webdriver import ActionChains  # noqa: E402  after the skips
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "runs" / "screenshots"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 120  # until something appears


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the app on a tiny checkpoint, as `python recipes/app.py` serves it."""
    folder = tmp_path_factory.mktemp("app")
    tiny_model().save_pretrained(folder / "tiny")
    encoder_side = ConvNextImageProcessorPil(size={"shortest_edge": SIDE})
    DeemProcessor.from_parts(encoder_side, build_tokenizer(), num_image_tokens=4, target_size=SIDE).save_pretrained(
        folder / "tiny"
    )
    shutil.copytree(folder / "tiny", folder / "other")
    command = [sys.executable, str(ROOT / "recipes/app.py"), "--model", str(folder / "tiny")]
    command += ["--against", str(folder / "other"), "--port", "0"]
    log = folder / "log"
    with open(log, "w") as file:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TMPDIR": str(folder)}
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    try:
        wait_for(lambda: "http://127.0.0.1:" in log.read_text() or server.poll() is not None)
        assert server.poll() is None, log.read_text()
        yield log.read_text().split("Running on local URL:")[1].split()[0]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    assert not list(folder.glob("deem-app-*"))  # what was uploaded is not kept


@pytest.fixture(scope="module")
def browser() -> Iterator["webdriver.Chrome"]:
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no Chromium with its chromedriver on this machine; `make browser` installs them on Debian")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for option in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1440,1300",
    ):
        options.add_argument(option)
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def wait_for(condition: Callable[[], object]) -> object:
    return WebDriverWait(None, SECONDS, poll_frequency=0.2).until(lambda _: condition())


@pytest.fixture
def app(page: str, browser) -> "Page":
    browser.get(page)
    return Page(browser)


class Page:
    """The page as a user sees it."""

    def __init__(self, browser) -> None:
        self.browser = browser
        wait_for(lambda: self.all("[role=tab]"))

    def all(self, selector: str) -> list:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str):
        return wait_for(lambda: self.all(selector))[0]

    def script(self, code: str, selector: str) -> object:
        """Run code on what a selector finds, `found`: in one go, since Gradio makes its elements anew at any time."""
        return self.browser.execute_script(
            f"const found = [...document.querySelectorAll(arguments[0])]; {code}", selector
        )

    def click(self, selector: str) -> None:
        wait_for(lambda: self.script("found[0]?.click(); return found.length", selector))

    def upload(self, selector: str, *files: Path) -> None:
        self.one(f"{selector} input[type=file]").send_keys("\n".join(map(str, files)))

    def whole_answer(self) -> str:
        """What has been said, once more can be asked and nothing has changed for a second (the page renders in steps)."""
        enabled = "return found.length > 0 && !found[0].disabled"

        def settled() -> str:
            before = self.words("#conversation .bot")
            time.sleep(1)
            now = self.words("#conversation .bot")
            return now if now == before and self.script(enabled, "#question textarea") else ""

        return wait_for(lambda: settled().strip(" ."))

    def type_number(self, label: str, number: int) -> None:
        """Type into the field of a slider that is on the page."""
        fields = self.all(f"input[type=number][aria-label*='{label}']")
        (field,) = [field for field in fields if field.is_displayed()]
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(number), Keys.TAB)

    def words(self, selector: str) -> str:
        return self.script("return found.map(element => element.innerText).join(' ')", selector)

    def open_tab(self, name: str) -> None:
        (tab,) = [tab for tab in self.all("[role=tab]") if tab.text == name]
        tab.click()

    def shows_image(self, selector: str) -> bool:
        """Whether an image is there and its pixels have come."""
        return self.script("return found.some(image => image.complete && image.naturalWidth > 1)", f"{selector} img")

    def keep(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.browser.save_screenshot(str(SCREENSHOTS / f"{name}.png"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((256, 192)).save(tmp_path / "house.png")
    return tmp_path / "house.png"


@pytest.fixture
def no_picture(tmp_path: Path) -> Path:
    (tmp_path / "letter.png").write_text("Dear all")
    return tmp_path / "letter.png"


def ask(app: Page, words: str) -> None:
    app.one("#question textarea").send_keys(words)
    app.click("#question .submit-button")


def test_chat_answers_and_draws(app: Page, page: str, picture: Path) -> None:
    app.click("#draw-when label:nth-of-type(2)")
    app.upload("#question", picture)
    wait_for(lambda: app.shows_image("#question"))
    ask(app, "What is this?")
    wait_for(lambda: app.words("#conversation .bot").strip())
    wait_for(lambda: app.shows_image("#conversation .bot"))
    assert "What is this?" in app.words("#conversation .user") and app.shows_image("#conversation .user")
    answered = app.whole_answer()
    app.keep("chat")
    assert not [path for path in ("/tmp", "pytest", str(ROOT), str(Path.home())) if path in app.words("body")]
    app.click("#conversation button[title=Retry]")
    wait_for(lambda: app.words("#conversation .bot").strip(" .") != answered)
    assert app.whole_answer() == answered
    app.browser.switch_to.new_window("tab")  # another user
    app.browser.get(page)
    other = Page(app.browser)
    assert not other.words("#conversation .user")


def test_a_region_is_painted_and_asked_about(app: Page, picture: Path) -> None:
    app.upload("#marked", picture)
    canvas = app.one("#marked canvas")
    wait_for(lambda: app.all("#marked button[aria-label=Brush]"))[0].click()
    strokes = ActionChains(app.browser).move_to_element_with_offset(canvas, -30, -20).click_and_hold()
    strokes.move_by_offset(60, 40).release().perform()
    app.keep("region")
    ask(app, "What is this part?")
    app.whole_answer()


def test_what_the_encoder_sees(app: Page, picture: Path) -> None:
    app.open_tab("What the encoder sees")
    app.upload("#seen", picture)
    wait_for(lambda: app.shows_image("#seen"))
    app.click("#look")
    for selector in ("#error-map-0", "#token-map-0", "#error-map-1"):
        wait_for(lambda selector=selector: app.shows_image(selector))
    table = app.words("#figures")
    assert "timestep" in table and "tiny" in table and "other" in table
    app.keep("seeing")
    for label, selector in (("Timestep", "#error-map-0"), ("Token", "#token-map-0")):
        before = app.script("return found[0].src", f"{selector} img")
        app.type_number(label, 2)
        wait_for(lambda s=selector, b=before: app.script("return found[0]?.src", f"{s} img") not in (None, b))


def test_draw(app: Page) -> None:
    app.open_tab("Draw")
    app.one("#words textarea").send_keys("a red circle")
    app.click("#draw")
    wait_for(lambda: "drawn in 25 steps" in app.words("#progress"))
    assert app.shows_image("#drawn")
    app.keep("draw")
    app.type_number("Steps", 250)
    app.click("#draw")
    wait_for(lambda: "of 250" in app.words("#progress"))
    app.click("#stop-drawing")
    wait_for(lambda: app.words("#progress").strip() == "Stopped.")
    time.sleep(1)
    assert app.words("#progress").strip() == "Stopped."


def test_a_file_that_is_no_image_gets_a_sentence(app: Page, no_picture: Path) -> None:
    app.upload("#question", no_picture)
    wait_for(lambda: app.all("#question .thumbnail-item"))
    ask(app, "And this?")
    wait_for(lambda: "letter.png cannot be read as an image" in app.words("#conversation .bot"))
    app.open_tab("What the encoder sees")
    app.upload("#seen", no_picture)
    app.click("#look")
    wait_for(lambda: "letter.png cannot be read as an image" in app.words("body"))
    app.keep("wrong_file")


@pytest.mark.parametrize("file", ["/etc/passwd", str(ROOT / "pyproject.toml"), "../../../../etc/passwd"])
def test_files_of_the_machine_stay_there(page: str, file: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{page.rstrip('/')}/gradio_api/file={file}", timeout=30)
    assert refused.value.code in (403, 404)


def test_no_request_reads_a_file_of_the_machine(page: str) -> None:
    address = f"{page.rstrip('/')}/gradio_api/call/see"
    secret = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    data = json.dumps({"data": [secret, "0", "", 1, False, 1, 1.0]}).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    event = json.loads(urllib.request.urlopen(request, timeout=30).read())["event_id"]
    said = urllib.request.urlopen(f"{address}/{event}", timeout=60).read().decode()
    assert "error" in said and "root" not in said and "passwd" not in said
