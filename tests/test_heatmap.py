"""Heat maps: the right token gets the right colour, and no text of a model can do anything but be read."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from llm_dqn import heatmap, pages
from llm_dqn.heatmap import Scale, cells_of, fragment, largest_drop, page


def score_line(tokens: list[str], values: list[float], advantages: list[float], **more: Any) -> dict[str, Any]:
    """A score line as `llm-dqn score` writes it, its completion the joined tokens."""
    count = len(tokens)
    line = {
        "prompt": "p",
        "completion": "".join(tokens),
        "reward": 0.5,
        "rewards": {"f": 0.5},
        "token_ids": list(range(count)),
        "tokens": tokens,
        "q_values": [v + a for v, a in zip(values, advantages, strict=True)],
        "values": values,
        "advantages": advantages,
        "ranks": [1] * count,
        "base_ranks": [2] * count,
        "alternatives": [
            [{"token": " other", "token_id": 9, "q_value": 0.25, "base_probability": 0.5, "probability": 0.125}]
        ]
        * count,
    }
    return line | more


class Spans(HTMLParser):
    """What a browser sees: the tokens with their classes and texts, all tags, all text outside scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tokens: list[tuple[set[str], str]] = []
        self.tags: list[str] = []
        self.text = ""
        self.script = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "script":
            self._inside = "script"
        facts = dict(attrs)
        if tag == "span" and "data-i" in facts:
            self._inside = "token"
            self.tokens.append((set((facts["class"] or "").split()), ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "span"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.script += data
            return
        self.text += data
        if self._inside == "token":
            look, text = self.tokens[-1]
            self.tokens[-1] = (look, text + data)


def test_colours_follow_the_numbers() -> None:
    """Advantages a and b, changes c and d, each in four levels of its own scale; the last change goes to the reward."""
    line = score_line(["a", "b", "c"], [0.5, 0.9, 0.1], [0.1, -0.2, 0.01], reward=0.3)
    found = Spans(fragment(line, Scale(advantage=0.2, change=0.8))).tokens
    assert [text for _, text in found] == ["a", "b", "c"]
    assert [look & {f"{m}{i}" for m in "abcd" for i in range(5)} for look, _ in found] == [
        {"a2", "c2"},
        {"b4", "d4"},
        {"c1"},
    ]
    assert ["drop" in look for look, _ in found] == [False, True, False]


def test_tokens_of_one_character_are_one() -> None:
    """Their advantages add up, and the value changes from before the first to after the last."""
    line = score_line(["x", "", "", "🦊", "y"], [0.5, 0.6, 0.65, 0.7, 0.2], [0.0, 0.1, 0.2, -0.05, 0.0])
    cells = cells_of(line)
    assert [(cell.text, cell.first, cell.last) for cell in cells] == [("x", 0, 0), ("🦊", 1, 3), ("y", 4, 4)]
    assert cells[1].advantage == pytest.approx(0.25) and cells[1].change == pytest.approx(0.2 - 0.6)
    assert largest_drop(cells) is cells[1]
    assert 'data-i="1 3"' in fragment(line)


def test_a_text_cut_inside_a_character_keeps_its_tokens() -> None:
    cells = cells_of(score_line(["x", "", ""], [0.5, 0.4, 0.3], [0.0] * 3))
    assert [(cell.text, cell.first, cell.last) for cell in cells] == [("x", 0, 0), ("", 1, 2)]


def test_only_a_special_token_at_the_end_is_one() -> None:
    ended = score_line(["a", "</s>"], [0.5, 0.5], [0.0, 0.0], completion="a")
    written = score_line(["a", "</s>"], [0.5, 0.5], [0.0, 0.0])
    assert [cell.ends for cell in cells_of(ended)] == [False, True]
    assert [cell.ends for cell in cells_of(written)] == [False, False]


def test_the_step_to_the_reward_is_no_token_drop() -> None:
    line = score_line(["a", "b", "c"], [0.5, 0.45, 0.6], [0.0] * 3, reward=-5.0)
    drop = largest_drop(cells_of(line))
    assert drop is not None and drop.text == "a"
    rising = score_line(["a", "b"], [0.5, 0.6], [0.0] * 2, reward=0.0)
    assert largest_drop(cells_of(rising)) is None


HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;",
    "]]><!--",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text: str) -> None:
    """In the prompt, the tokens, the alternatives, the names of rewards and the title."""
    line = score_line([text, " b"], [0.5, 0.6], [0.1, -0.1], prompt=text, rewards={text: 0.5, "g": 0.5})
    line["alternatives"] = [[{"token": text, "token_id": 1, "q_value": 0.0, "base_probability": 1.0}]] * 2
    harmless = page([score_line(["a", " b"], [0.5, 0.6], [0.1, -0.1], rewards={"f": 1.0, "g": 0.5})], "title")
    html = page([line], text)
    seen = Spans(html)
    assert seen.tags == Spans(harmless).tags
    assert seen.tokens[0][1] == text and text in seen.text.replace("\n", "")
    data = json.loads(Spans(fragment(line)).script)
    assert data["tokens"][0][0] == text and data["tokens"][0][6][0] == [text, 1.0, None, 0.0]


def test_terminal_codes_and_direction_marks_do_not_reach_the_page() -> None:
    nasty = "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x07 \x9b2J \u202eevil\u2066 \ud800"
    html = page([score_line([nasty], [0.5], [0.0], prompt=nasty)], nasty)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", html)
    assert "red" in html and "⟨U+202E⟩evil" in html and "title" not in Spans(html).tokens[0][1]
    html.encode()


def test_joiners_and_accents_survive() -> None:
    text = "👨‍👩‍👧 e\u0301 👍🏽 \u200fabc\u200e نعم"
    assert pages.clean(text) == text


def test_white_space_is_visible_and_copies_as_it_was() -> None:
    line = score_line([" ", "\n", "a\n\n", "\tb", "    "], [0.5] * 5, [0.0] * 5)
    html = fragment(line)
    assert "".join(text for _, text in Spans(html).tokens) == " \na\n\n\tb    "
    assert html.count('class="line-end"') == 3 and html.count('class="tab"') == 1 and html.count('class="space"') == 2
    assert [row[0] for row in json.loads(Spans(html).script)["tokens"]] == ["␣", "⏎", "a⏎⏎", "⇥b", "␣␣␣␣"]


def test_the_legend_says_the_numbers() -> None:
    lines = [score_line(["a"] * 100, [0.5] * 100, [0.3] * 100, reward=0.5)]
    (advantage, change) = heatmap.legends(Scale.of(lines))
    assert [step["number"] for step in advantage["steps"]] == (
        ["−0.4 or less", "−0.3", "−0.2", "−0.1", "0", "+0.1", "+0.2", "+0.3", "+0.4 or more"]
    )
    assert advantage["steps"][0]["look"].startswith("b4") and change["steps"][-1]["look"].startswith("c4")


def test_lines_without_reward_or_ranks_or_numbers_are_drawn() -> None:
    bare = score_line(["a", "b"], [0.5, float("nan")], [0.1, float("nan")], reward=None, rewards={"f": None})
    for name in ("ranks", "base_ranks", "alternatives"):
        del bare[name]
    html = fragment(bare)
    assert "no reward" in html and "nan" not in html.lower()
    assert "0 tokens" in fragment(score_line([], [], [], completion=""))
    assert "nothing to score" in page([], "t")


def test_a_page_too_long_says_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heatmap, "MAX_TOKENS", 5)
    monkeypatch.setattr(heatmap, "MAX_TOKENS_A_TEXT", 3)
    lines = [score_line(["a", "b"], [0.5, 0.5], [0.1, 0.1])] * 4
    html = page(lines, "t")
    assert "The first 2 of 4 completions" in html and len(Spans(html).tokens) == 4
    long = score_line(["a"] * 10, [0.5] * 10, [0.1] * 10)
    html = page([long], "t")
    assert "10 tokens, the first 3 shown" in html and len(Spans(html).tokens) == 3


def test_a_page_forbids_the_network_and_names_no_address() -> None:
    html = page([score_line(["a"], [0.5], [0.1])], "t")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy is not None and policy[1].startswith("default-src &#39;none&#39;; style-src &#39;sha256-")
    assert "unsafe" not in policy[1]
    addresses = set(re.findall(r"(?:https?:)?//[a-z][^\s\"'<)]*", re.sub(r"// [^\n]*", "", html)))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\sstyle=|\son[a-z]+=", re.sub(r"<(script|style)>.*?</\1>", "", html, flags=re.S))
