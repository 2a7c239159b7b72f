"""Photographs a report for the README: `python -m docs.screenshot runs/quickstart`, from the top of the checkout.

Needs a finished run with its report.html, Chromium and chromedriver. Writes docs/report.png (the top of the report) and
docs/tokens.png (a heat map with the readout of a token).
"""

import base64
import sys
from pathlib import Path

from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from tests.browser import chromium, window

FOLDER = Path(__file__).parent
WIDTH = 1180
MARGIN = 28


def photograph(browser: Chrome, top: float, bottom: float, file: Path) -> None:
    """The page between two heights, in CSS pixels."""
    clip = {"x": 0, "y": top, "width": WIDTH, "height": bottom - top, "scale": 1}
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    file.write_bytes(base64.b64decode(taken["data"]))
    print(f"{file} ({file.stat().st_size / 1000:.0f} kB)")


def strongest(tokens: list[WebElement]) -> WebElement:
    """The first of the tokens with the highest advantage."""
    return next(t for level in "4321" for t in tokens if f"a{level}" in (t.get_attribute("class") or "").split())


def main(report: Path) -> None:
    """Takes both pictures."""
    with chromium() as browser:
        window(browser, WIDTH, 900)
        browser.get(report.resolve().as_uri())
        section = browser.find_element(By.XPATH, "//section[h2[@id='measured']]")
        photograph(browser, 0, section.rect["y"] + section.rect["height"] + MARGIN, FOLDER / "report.png")

        maps = browser.find_elements(By.CSS_SELECTOR, ".maps .group")[:2]
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", maps[1])
        ActionChains(browser).move_to_element(strongest(maps[1].find_elements(By.CSS_SELECTOR, ".t"))).perform()
        top, bottom = maps[0].rect["y"] - MARGIN, maps[1].rect["y"] + maps[1].rect["height"] + MARGIN
        photograph(browser, top, bottom, FOLDER / "tokens.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) / "report.html")
