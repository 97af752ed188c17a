"""The built site's search, opened as a file: in Debian's headless chromium, where there is one."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from .browser import WAIT, needs_browser, start_browser
from .pages import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pages with the site's own theme, plugins and script, but without the API's pages, which take longest."""
    folder = tmp_path_factory.mktemp("a folder")
    (folder / "docs").mkdir()
    (folder / "docs" / "index.md").write_text("# Start\n\n[Next](other.md)\n", encoding="utf-8")
    (folder / "docs" / "other.md").write_text("# Other\n\nWhat a marmoset eats.\n", encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "assets", folder / "docs" / "assets")
    config = load_config(
        str(ROOT / "mkdocs.yml"), docs_dir=str(folder / "docs"), site_dir=str(folder / "site"), hooks=[],
        nav=[{"Start": "index.md"}, {"Other": "other.md"}], plugins=["search", "offline"],
    )  # fmt: skip
    level = logging.getLogger("mkdocs").level
    build(config)
    logging.getLogger("mkdocs").setLevel(level)
    return folder / "site"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    driver = start_browser(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


def test_site_for_a_folder_holds_the_index_and_the_script_that_searches_it(site: Path) -> None:
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    texts = [page["text"] for page in json.loads(index.removeprefix("var __index = "))["docs"]]
    assert any("marmoset" in text for text in texts)
    for page in ("index.html", "other.html"):
        assert '<script src="assets/iframe-worker.js"></script>' in (site / page).read_text(encoding="utf-8")


@needs_browser
def test_search_finds_a_page_of_a_site_that_was_opened_from_a_folder(site: Path, browser: webdriver.Chrome) -> None:
    browser.get((site / "index.html").as_uri())
    WebDriverWait(browser, WAIT).until(lambda driver: driver.find_element(By.CSS_SELECTOR, ".md-search__input"))
    browser.execute_script("document.querySelector('#__search').click()")
    browser.find_element(By.CSS_SELECTOR, ".md-search__input").send_keys("marmoset")
    found = WebDriverWait(browser, WAIT, poll_frequency=0.05).until(
        lambda driver: driver.find_elements(By.CSS_SELECTOR, ".md-search-result__link")
    )
    assert found[0].get_attribute("href").startswith((site / "other.html").as_uri())
