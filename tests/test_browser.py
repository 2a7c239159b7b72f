"""The report and the heat map in a real browser: no error, no request, readable in any light and any window."""

import itertools
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from llm_dqn.heatmap import page
from tests.browser import chromium, window

HARD_TEXTS: list[tuple[str, list[str]]] = [
    ("A family", ["Sure", " ", "", "", "", "👨‍👩‍👧", " and", "", "", "👍🏽", " é", "."]),
    ("اكتب جملة", ["الطق", "س", " الي", "وم", " جم", "يل", " hello", "."]),
    ("כתוב משפט", ["מזג", " האו", "ויר", " (", "GPT", ")", "!"]),
    ("写一句话", ["今天", "天", "气", "", "真", "好", "。"]),
    ("def f(x):", ["\n", "    ", "return", " x", "\n\n", "\t", "# " + "long" * 60]),
    (
        "<script>alert(1)</script>",
        ["<script>document.title='hacked'</script>", "<img src=x onerror=alert(1)>", " \x1b[31mred"],
    ),
]

# every text node that can be seen, with the colours that it has
CONTRASTS = """
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (rgb) => {
  const [r, g, b] = rgb.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const [r, g, b, a = 1] = parse(getComputedStyle(at).backgroundColor);
    if (a > 0) return [r, g, b];
  }
  return [255, 255, 255];
};
const found = {};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || !element.getClientRects().length) continue;
  if (element.closest("script,style,desc,title")) continue;
  const style = getComputedStyle(element);
  const ink = parse(element.closest("svg") ? style.fill : style.color).slice(0, 3);
  const paper = behind(element);
  const [low, high] = [light(ink), light(paper)].sort((a, b) => a - b);
  const key = `${element.tagName}.${element.className.baseVal ?? element.className} ${ink} on ${paper}`;
  found[key] = (high + 0.05) / (low + 0.05);
}
return found;
"""
# what reaches beyond the right edge and does not lie in a box that scrolls by itself
BEYOND = """
const edge = document.documentElement.clientWidth + 0.5;
return [...document.querySelectorAll("body *")]
  .filter((e) => e.getClientRects().length && !e.closest(".scroll,pre,svg,#readout"))
  .filter((e) => e.getBoundingClientRect().right > edge).map((e) => e.outerHTML.slice(0, 120));
"""


def score_line(prompt: str, tokens: list[str], **more: Any) -> dict[str, Any]:
    """Numbers of all sizes and both signs, and an end-of-sequence token."""
    shown, count = [*tokens, "</s>"], len(tokens) + 1
    values = [0.5 + 0.3 * (-1) ** i * i / count for i in range(count)]
    advantages = [0.25 * (i / count) * (-1) ** (i // 2) for i in range(count)]
    other = {"token": " other", "token_id": 7, "q_value": 0.125, "base_probability": 0.625, "probability": 0.25}
    line = {"prompt": prompt, "completion": "".join(tokens), "reward": 0.75, "rewards": {"f": 0.75}}
    numbers = {"q_values": [v + a for v, a in zip(values, advantages, strict=True)], "values": values}
    ranks = {"advantages": advantages, "ranks": [1] * count, "base_ranks": [3] * count}
    return (
        line
        | {"token_ids": list(range(count)), "tokens": shown, "alternatives": [[other]] * count}
        | numbers
        | ranks
        | more
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def heat_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pages") / "heat map.html"
    file.write_text(page([score_line(*text) for text in HARD_TEXTS], "Hard texts"), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def report(trained_run: Path) -> Path:
    return trained_run / "report.html"


@pytest.fixture(params=["report", "heat_page"])
def either(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def opened(browser: Chrome, file: Path, width: int = 1280, dark: bool = False) -> Chrome:
    window(browser, width, 900, dark)
    browser.get(file.as_uri())
    return browser


def readout(browser: Chrome) -> str:
    """What the readout says; nothing while it is hidden."""
    return browser.find_element(By.ID, "readout").text


def token(browser: Chrome, text: str) -> WebElement:
    return next(t for t in browser.find_elements(By.CSS_SELECTOR, ".heat .t") if t.get_property("textContent") == text)


def test_opening_gives_no_error_and_no_request(browser: Chrome, either: Path) -> None:
    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    opened(browser, either)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert asked == {either.as_uri()} or asked == {either.as_uri(), "data:,"}
    assert "hacked" not in browser.title


def test_the_pages_own_policy_keeps_them_from_the_network(browser: Chrome, either: Path, tmp_path: Path) -> None:
    """Even a script that got in could not send anything: nobody knocks at a server that listens."""
    knocks: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            knocks.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Keeps the tests' output clean."""

    with HTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        knock = f"""
          const done = arguments[0];
          new Image().src = "{address}/image";
          const link = document.head.appendChild(document.createElement("link"));
          link.rel = "stylesheet"; link.href = "{address}/style";
          document.head.appendChild(document.createElement("script")).src = "{address}/script";
          fetch("{address}/fetch").catch(() => 0).finally(() => setTimeout(done, 200));
        """
        opened(browser, either).execute_async_script(knock)
        assert knocks == []
        without = re.sub(r"<meta http-equiv=.*?>", "", either.read_text(encoding="utf-8"))
        open_page = tmp_path / "without policy.html"
        open_page.write_text(without, encoding="utf-8")
        opened(browser, open_page).execute_async_script(knock)
        assert knocks  # the listener does listen
        server.shutdown()
    browser.get_log("browser")


@pytest.mark.parametrize("width", [360, 620, 1280])
def test_nothing_reaches_beyond_the_window(browser: Chrome, either: Path, width: int) -> None:
    opened(browser, either, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    assert browser.execute_script(BEYOND) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("by", ["by-advantage", "by-change"])
def test_every_text_can_be_read(browser: Chrome, either: Path, dark: bool, by: str) -> None:
    """WCAG 2.1 AA: a contrast of 4.5 for all text, tokens on their colours included."""
    opened(browser, either, dark=dark)
    browser.find_element(By.ID, by).click()
    found = browser.execute_script(CONTRASTS)
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 200) == dark
    assert len(found) > 10 and {key: ratio for key, ratio in found.items() if ratio < 4.5} == {}


def test_the_report_has_its_parts_and_charts(browser: Chrome, report: Path) -> None:
    opened(browser, report)
    headings = [h.text for h in browser.find_elements(By.TAG_NAME, "h2")]
    assert headings[:5] == ["Reward", "Before and after", "Warning signs", "Samples", "Token by token"]
    assert headings[5:] == ["Do the values mean what they say?", "Learning", "Strength", "Configuration"]
    charts = browser.find_elements(By.CSS_SELECTOR, "svg.chart[data-plot]")
    shown = [chart for chart in charts if chart.is_displayed()]
    assert len(shown) >= 10
    for chart in shown:
        lines = chart.find_elements(By.CSS_SELECTOR, ".series path, .series circle")
        assert lines and chart.get_attribute("aria-label") and chart.size["height"] > 100
    links = [a.get_attribute("href") for a in browser.find_elements(By.TAG_NAME, "a")]
    ids = {h.get_attribute("id") for h in browser.find_elements(By.TAG_NAME, "h2")}
    assert {link.split("#")[1] for link in links} == ids and all(link.startswith(report.as_uri()) for link in links)


def numbers(said: str) -> tuple[int, float]:
    """(completions scored, reward while training) in a readout."""
    found = re.search(r"completions scored: ([\d,]+)\nwhile training ([\d.−]+)", said)
    assert found is not None, said
    return int(found[1].replace(",", "")), float(found[2].replace("−", "-"))


def test_charts_say_their_numbers_to_pointer_and_keys(browser: Chrome, report: Path) -> None:
    rows = [json.loads(line) for line in (report.parent / "metrics.jsonl").read_text().splitlines()]
    opened(browser, report)
    chart = browser.find_element(By.CSS_SELECTOR, ".panel.over-completions .wide svg")
    ActionChains(browser).move_to_element_with_offset(chart, 0, 0).perform()
    assert f"completions scored: {rows[0]['scored_completions']}" not in readout(browser)
    assert "base model" in readout(browser)
    collected = {row["scored_completions"]: row["rollout/reward"] for row in rows if "rollout/reward" in row}
    scored, reward = numbers(readout(browser))
    assert reward == pytest.approx(collected[scored], rel=1e-3)
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    assert readout(browser) == ""
    chart.send_keys(Keys.END)
    assert numbers(readout(browser)) == pytest.approx(
        (rows[-1]["scored_completions"], rows[-1]["rollout/reward"]), rel=1e-3
    )
    chart.send_keys(Keys.ARROW_LEFT)
    assert f"completions scored: {rows[-2]['scored_completions']:,}" in readout(browser)
    chart.send_keys(Keys.ESCAPE)
    assert readout(browser) == ""
    browser.find_element(By.ID, "over-time").click()
    assert not chart.is_displayed()
    assert browser.find_element(By.CSS_SELECTOR, ".panel.over-time .wide svg").is_displayed()


def test_histograms_say_their_bins(browser: Chrome, report: Path) -> None:
    opened(browser, report)
    chart = browser.find_element(By.XPATH, "//*[name()='svg'][.//*[@data-half]]")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    ActionChains(browser).move_to_element(chart).perform()
    assert re.search(r"reward: \S+ to \S+", readout(browser)) and "tuned model" in readout(browser)


def test_tokens_say_their_numbers_to_pointer_keys_and_taps(browser: Chrome, heat_page: Path) -> None:
    opened(browser, heat_page)
    word = token(browser, " and")
    ActionChains(browser).move_to_element(word).perform()
    line = score_line(*HARD_TEXTS[0])
    i = line["tokens"].index(" and")
    said = readout(browser)
    assert "“␣and”" in said and f"Q {line['q_values'][i]:.4g}".rstrip("0") in said
    assert "the base would have written:" in said and "␣other 62.5 % 25 % 0.125" in said
    assert "choice 1 of the tuned model, 3 of the base" in said
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    assert readout(browser) == ""

    first = token(browser, "Sure")
    browser.execute_script("document.querySelector('#by-change').focus()")
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.switch_to.active_element == first and "“Sure”" in readout(browser)
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT).perform()
    assert browser.switch_to.active_element.get_property("textContent") == "👨‍👩‍👧"
    assert "4 tokens make up this character" in readout(browser) and "part of a character" in readout(browser)
    ActionChains(browser).send_keys(Keys.END).perform()
    assert "value" in readout(browser) and "→ reward 0.75" in readout(browser)
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert readout(browser) == ""

    opened(browser, heat_page, width=360)
    spot = token(browser, "Sure").rect
    touch = {"type": "touchStart", "touchPoints": [{"x": spot["x"] + 5, "y": spot["y"] + 5}]}
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    browser.execute_cdp_cmd("Input.dispatchTouchEvent", touch)
    browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    assert "“Sure”" in readout(browser)
    box = browser.find_element(By.ID, "readout").rect
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360


def test_right_to_left_texts_run_from_right_to_left(browser: Chrome, heat_page: Path) -> None:
    """Each text in its own direction, the arrow keys along with it, and the end token not mirrored."""
    opened(browser, heat_page)
    first, second = token(browser, "الطق"), token(browser, " الي")
    assert first.rect["x"] > second.rect["x"]
    assert token(browser, "今天").rect["x"] < token(browser, "气").rect["x"]
    first.click()
    ActionChains(browser).send_keys(Keys.ARROW_LEFT).perform()
    assert browser.switch_to.active_element.get_property("textContent") == "س"
    end = first.find_element(By.XPATH, "following-sibling::*[last()]")
    assert end.text == "</s>"
    assert [end.value_of_css_property(name) for name in ("direction", "unicode-bidi")] == ["ltr", "isolate"]


def test_colours_switch_to_the_change_in_value(browser: Chrome, heat_page: Path) -> None:
    opened(browser, heat_page)
    words = browser.find_elements(By.CSS_SELECTOR, ".heat .t")

    def looks() -> list[tuple[str, str]]:
        return [
            (w.value_of_css_property("background-color"), w.value_of_css_property("text-decoration")) for w in words
        ]

    before = looks()
    legends = browser.find_elements(By.CSS_SELECTOR, ".legend")
    assert [legend.is_displayed() for legend in legends] == [True, False]
    browser.find_element(By.ID, "by-change").click()
    assert [legend.is_displayed() for legend in legends] == [False, True]
    after = looks()
    assert sum(a != b for a, b in zip(before, after, strict=True)) > len(words) / 3
    for mode, seen in (("ab", before), ("cd", after)):
        for element, (_, line) in zip(words, seen, strict=True):
            classes = element.get_attribute("class") or ""
            rising, falling = (re.search(rf"\b{letter}(\d)", classes) for letter in mode)
            assert ("solid" in line or "wavy" not in line) if rising else "wavy" in line if falling else "none" in line


def test_shades_differ_in_greyscale(browser: Chrome, heat_page: Path) -> None:
    """On paper the sign is told by the line, the size by the shade: each level is clearly darker than the last."""
    opened(browser, heat_page)
    steps = browser.find_elements(By.CSS_SELECTOR, ".legend.advantage .t")
    colours = [list(map(int, re.findall(r"\d+", s.value_of_css_property("background-color"))[:3])) for s in steps]
    greys = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in colours]
    negative, positive = [255, *greys[3::-1]], [255, *greys[5:]]
    for side in (negative, positive):
        assert all(lighter - darker > 8 for lighter, darker in itertools.pairwise(side))


def test_on_paper_the_colours_stay_and_the_controls_go(browser: Chrome, heat_page: Path) -> None:
    opened(browser, heat_page, dark=True)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not browser.find_element(By.CSS_SELECTOR, ".switch").is_displayed()
    assert browser.find_element(By.CSS_SELECTOR, ".legend.advantage").is_displayed()
    word = browser.find_element(By.CSS_SELECTOR, ".heat .t")
    assert word.value_of_css_property("print-color-adjust") == "exact"
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
