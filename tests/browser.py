"""A real browser for tests: Debian's chromium, headless, driven by chromedriver."""

import shutil
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# Without the sandbox, which root cannot have; and with nothing that would look up hosts of its own accord.
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1100,800"
)
WAIT = 60  # seconds, never used up unless something is broken

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None,
    reason="needs a browser: `apt-get install chromium chromium-driver` puts /usr/bin/chromium and chromedriver there",
)


def start_browser(profile: Path) -> webdriver.Chrome:
    """Starts it with a fresh profile; `quit` ends it."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
