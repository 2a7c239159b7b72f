"""A real headless Chromium, driven through its own chromedriver; nothing is downloaded."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

NAMES = ("chromium", "chromium-browser", "google-chrome")
MISSING = (
    "NO BROWSER: the pages were not opened. Install chromium and chromedriver (Debian and Ubuntu: apt-get install "
    "chromium chromium-driver) and run these tests again."
)
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # for root; the pages are our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)


def paths() -> tuple[str, str] | None:
    """Of the browser and its driver, None where one is missing."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A browser with a profile of its own that notes every console message and every request."""
    found = paths()
    if found is None:
        pytest.skip(MISSING)
    profile = tempfile.mkdtemp(prefix="llm_dqn_browser_")
    options = Options()
    options.binary_location, driver = found
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(executable_path=driver))
    try:
        yield browser
    finally:
        browser.quit()
        shutil.rmtree(profile, ignore_errors=True)


def window(browser: webdriver.Chrome, width: int, height: int = 900, dark: bool = False, scale: float = 1) -> None:
    """Sets the size of the page in CSS pixels, exactly, and the colours that the reader prefers."""
    size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
