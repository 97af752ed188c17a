"""The page in a real browser."""

from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from ...browser import WAIT, needs_browser, start_browser
from .conftest import MARKUP

pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    driver = start_browser(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture
def find(browser: webdriver.Chrome) -> Callable[..., WebElement]:
    """Waits for an element, by CSS, that contains a text."""

    def find(css: str, text: str = "") -> WebElement:
        def look(driver: webdriver.Chrome) -> WebElement | None:
            return next((e for e in driver.find_elements(By.CSS_SELECTOR, css) if text in e.text), None)

        # The page may replace an element between finding and reading it.
        wait = WebDriverWait(browser, WAIT, poll_frequency=0.05, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(look, f"{css} with {text!r}")

    return find


def loaded_hosts(browser: webdriver.Chrome) -> set[str]:
    urls = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    return {urlsplit(url).netloc for url in urls}


def texts_of(browser: webdriver.Chrome, selector: str) -> list[str]:
    """Texts of all elements at one moment: the page may replace them between two questions."""
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(element => element.innerText.trim())", selector
    )


def test_browser_picked_puzzle_fills_both_boards_and_steps_back(
    browser: webdriver.Chrome, find: Callable[..., WebElement], pages: dict[str, str]
) -> None:
    browser.get(pages["board"])
    box = find("#puzzle textarea, #puzzle input")
    first = box.get_attribute("value")
    find("#pick input").click()
    find("#pick [role=option], ul[role=listbox] li", "2:").click()
    WebDriverWait(browser, WAIT).until(lambda driver: box.get_attribute("value") != first)
    picked = box.get_attribute("value")
    find("#run").click()
    counts = []
    for side in ("#relay-on", "#relay-off"):
        find(f"{side} .relay-note", "after")
        cells = texts_of(browser, f"{side} td")
        assert len(cells) == 16
        assert all(cells)
        assert all(text == clue for text, clue in zip(cells, picked, strict=True) if clue != ".")
        counts.append(int(texts_of(browser, f"{side} .relay-count b")[0]))
    assert min(counts) > 0

    find("#step input[type=range]").send_keys(Keys.HOME)
    for side in ("#relay-on", "#relay-off"):
        find(f"{side} .relay-note", "step 0 of")
        assert texts_of(browser, f"{side} .relay-count b") == ["0"]
        assert len(browser.find_elements(By.CSS_SELECTOR, f"{side} td.masked")) == picked.count(".")
    assert loaded_hosts(browser) == {urlsplit(pages["board"]).netloc}


def test_browser_text_is_shown_as_it_is(
    browser: webdriver.Chrome, find: Callable[..., WebElement], pages: dict[str, str]
) -> None:
    browser.get(pages["text"])
    find("#prompt textarea").send_keys(MARKUP.strip() + "<i id=made>{{y}}${z}")
    find("#run").click()
    find("#relay-on .relay-note", "whole run")
    WebDriverWait(browser, WAIT).until(lambda driver: "[MASK]" not in find("#relay-off .relay-text").text)
    for side in ("#relay-on", "#relay-off"):
        shown = find(f"{side} .relay-text").text
        assert MARKUP.strip() + "<i id=made>{{y}}${z}" in shown
        tags = {e.tag_name for e in browser.find_elements(By.CSS_SELECTOR, f"{side} .relay-text *")}
        assert tags <= {"span", "br"}
    assert loaded_hosts(browser) == {urlsplit(pages["text"]).netloc}
