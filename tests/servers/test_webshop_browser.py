"""The shop's web pages in a real browser: headless Chromium, driven by Selenium."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from served_shop import HOSTILE, HOSTILE_ASIN, HOSTILE_OPTION, HOSTILE_WORD, ServerProcess

from env_servers.webshop.shop import Shop

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--window-size=1280,1000",
)  # fmt: skip
WAIT_SECONDS = 30.0


def _missing(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}; under CI these tests must run")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """A browser with a fresh profile."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        _missing("no browser: apt-get install chromium chromium-driver")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ModuleNotFoundError:
        _missing("no selenium: pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = str(chromium)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = Service(str(driver), log_output=subprocess.DEVNULL)
    found = webdriver.Chrome(options=options, service=service)
    found.set_page_load_timeout(60)
    yield found
    found.quit()


@pytest.fixture(scope="module")
def address(shop_folder: Path) -> Iterator[str]:
    """The URL of the small shop's server."""
    server = ServerProcess(
        ["webshop", "--port", "0", "--data", str(shop_folder), "--noun-tagger", "words"]
    )
    yield server.url
    assert server.stop() == (0, "")


class Person:
    """A person who shops in the browser."""

    def __init__(self, browser: Chrome, address: str) -> None:
        self.browser = browser
        self.address = address

    def start(self, task_id: str) -> None:
        """Begins a certain task on the front page."""
        self.browser.get(f"{self.address}/shop")
        assert self.browser.title == "Choose a task"
        box = self.find("input[name=task_id]")
        box.send_keys(task_id)
        box.submit()
        self.wait_for_step(0)

    def find(self, selector: str) -> Any:
        """The first element of a CSS selector, which must be there soon."""
        from selenium.webdriver.common.by import By
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.browser, WAIT_SECONDS)
        return wait.until(lambda browser: browser.find_element(By.CSS_SELECTOR, selector))

    def all(self, selector: str) -> list[Any]:
        """All elements of a CSS selector."""
        from selenium.webdriver.common.by import By

        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def step(self) -> int:
        """The number of steps that the page in the browser shows."""
        from selenium.common.exceptions import WebDriverException

        script = (
            "const turn = document.querySelector('.turn');"
            "return document.readyState === 'complete' && turn ? turn.textContent : '';"
        )
        try:
            shown = self.browser.execute_script(script)
        except WebDriverException:
            # Between two pages.
            return -1
        return int(shown.split()[1]) if shown else -1

    def wait_for_step(self, step: int) -> None:
        """Wait until the page shows this number of steps."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, WAIT_SECONDS).until(lambda _: self.step() == step)

    def search(self, words: str) -> None:
        """Types into the search bar and presses the button."""
        step = self.step()
        box = self.find("input[name=query]")
        box.clear()
        box.send_keys(words)
        self.find("#search").click()
        self.wait_for_step(step + 1)

    def press(self, action: str) -> None:
        """Presses the button that plays an action."""
        step = self.step()
        self.button(action).click()
        self.wait_for_step(step + 1)

    def button(self, action: str) -> Any:
        """The button that plays an action."""
        found = [e for e in self.all("button") if e.get_attribute("value") == f"click[{action}]"]
        assert len(found) >= 1, action
        return found[0]

    def complaints(self) -> list[str]:
        """Return the messages of the browser's console, such as refused scripts."""
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture
def person(browser: Chrome, address: str) -> Person:
    browser.get("about:blank")
    browser.get_log("browser")
    return Person(browser, address)


def a_goal_with_options(shop: Shop) -> tuple[str, Any]:
    """A task whose product must be bought with options."""
    for task_id in shop.task_ids("train"):
        goal = shop.goal(task_id)
        if goal.asin != HOSTILE_ASIN and len(goal.options) >= 2:
            return task_id, goal
    raise AssertionError("no such goal")


@pytest.mark.slow
def test_a_person_searches_chooses_buys_and_sees_the_score(
    person: Person, small_shop: Shop
) -> None:
    task_id, goal = a_goal_with_options(small_shop)
    person.start(task_id)
    assert person.find("#instruction").text == goal.instruction
    person.search(goal.name)
    assert len(person.all(".card")) == 10
    assert all(card.is_displayed() for card in person.all(".card .picture"))
    person.press("next >")
    person.press("< prev")
    person.press(goal.asin.lower())
    assert person.find("h1").text == goal.name
    assert person.all("[aria-pressed=true]") == []
    for place, (_, value) in enumerate(goal.options, start=1):
        person.press(value)
        chosen = [button.text for button in person.all("[aria-pressed=true]")]
        assert value in chosen
        assert len(chosen) == place
    for name in ("description", "features", "reviews"):
        person.press(name)
        assert person.find("h1").text == name.capitalize()
        person.press("< prev")
    assert len(person.all("[aria-pressed=true]")) == len(goal.options)
    person.press("buy now")
    assert person.find("h1").text == "Thank you for shopping with us!"
    assert person.find("#score").text == "1.0"
    parts = person.find("#parts").text
    assert all(part in parts for part in ("Attributes", "Options", "Price", "Kind of product"))
    assert person.complaints() == []


@pytest.mark.slow
def test_back_button_and_double_click_play_nothing_twice(person: Person, small_shop: Shop) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    task_id, goal = a_goal_with_options(small_shop)
    person.start(task_id)
    person.search(goal.name)
    person.press(goal.asin.lower())
    ActionChains(person.browser).double_click(person.button(goal.options[0][1])).perform()
    person.wait_for_step(3)
    person.press("features")
    here = person.browser.current_url
    person.browser.back()
    # Wherever the browser went, the session's address shows where the session is.
    person.browser.get(here)
    person.wait_for_step(4)
    assert person.find("h1").text == "Features"
    # A second window is still on an old page: its button leads to where the session is now.
    old = person.browser.current_window_handle
    person.browser.switch_to.new_window("tab")
    person.browser.get(here)
    person.press("< prev")
    person.press("buy now")
    person.browser.close()
    person.browser.switch_to.window(old)
    assert person.step() == 4
    person.button("< prev").click()
    person.wait_for_step(6)
    assert 0 < float(person.find("#score").text) <= 1
    assert person.complaints() == []


@pytest.mark.slow
def test_markup_and_scripts_stay_text(person: Person, small_shop: Shop) -> None:
    task_id, _ = a_goal_with_options(small_shop)
    person.start(task_id)
    person.search(f"{HOSTILE_WORD} {HOSTILE}")
    assert HOSTILE in person.find(".card .name").get_attribute("textContent")
    titles = [person.browser.title]
    for action in (HOSTILE_ASIN.lower(), HOSTILE_OPTION, "description", "< prev", "features",
                   "< prev", "reviews", "< prev", "buy now"):  # fmt: skip
        person.press(action)
        titles.append(person.browser.title)
        assert person.all("script, img, iframe") == []
        if action != "reviews":
            assert "<img src=x" in person.find("main").get_attribute("textContent").lower()
    assert "owned" not in titles
    assert person.complaints() == []


@pytest.mark.slow
def test_an_unknown_page_is_an_error_page_for_people(person: Person) -> None:
    person.browser.get(f"{person.address}/shop/no-such-session")
    assert "404" in person.find("main").text
    person.find("main a").click()
    assert person.find("#start").text == "Start shopping"
