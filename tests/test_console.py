import io
from collections.abc import Callable

import pytest
from rich.panel import Panel
from rich.text import Text

from llm_dqn.console import Console, Screen
from llm_dqn.terminal import harmless, one_line

View = tuple[Console, Callable[[], str]]
EVIL = "[bold red]good[/] \x1b[2J\x1b]0;owned\x07 [/nothing] \u202eback"


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., View]:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def make(terminal: bool, enabled: bool = True) -> View:
        stream = io.StringIO()
        rich = Screen(file=stream, force_terminal=terminal, width=160, color_system=None)
        return Console(enabled, rich), stream.getvalue

    return make


FIGURES = {"reward": 0.25, "reward_ci": [0.2, 0.3], "reward_greedy": 0.3, "kl": 0.0, "perplexity": 12.0, "length": 30.0}
SAMPLE = {"prompt": "It was", "base": EVIL, "base_reward": 0.1, "tuned": " lovely", "tuned_reward": 0.9}


def test_outside_a_terminal_a_log_step_is_one_line(screen: Callable[..., View]) -> None:
    console, output = screen(terminal=False)
    with console.live(500):
        console.sample("It was", EVIL, 0.5)
        console.update({"step": 10, "rollout/reward": 0.1234, "train/td_loss": None, "replay/episodes": 640})
    assert output() == "step 10/500  reward 0.123  episodes remembered 640\n"


def test_in_a_terminal_a_panel_shows_progress_numbers_and_the_last_sample(screen: Callable[..., View]) -> None:
    console, output = screen(terminal=True)
    with console.live(500):
        console.sample([{"role": "user", "content": "How was it?"}], " lovely", 0.5)
        console.progress(10)
        console.update({"step": 10, "rollout/reward": 0.1234})
    assert all(text in output() for text in ("10/500", "0.123", "How was it?", "lovely"))


def test_continuous_integration_gets_lines_even_with_a_terminal(
    screen: Callable[..., View], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")
    console, output = screen(terminal=True)
    with console.live(5):
        console.update({"step": 1})
    assert output() == "step 1/5\n"


def test_other_processes_are_silent(screen: Callable[..., View]) -> None:
    console, output = screen(terminal=True, enabled=False)
    with console.live(5):
        console.say("hello")
        console.update({"step": 1})
        console.final_table(FIGURES, FIGURES, 0.5, [SAMPLE])
        console.where("runs/x")
    assert output() == ""


def test_the_table_compares_base_and_tuned_with_intervals(screen: Callable[..., View]) -> None:
    console, output = screen(terminal=False)
    console.final_table(FIGURES, FIGURES | {"reward": 0.75, "reward_ci": [0.7, 0.8]}, 0.9, [SAMPLE])
    shown = output()
    assert (
        "held-out prompts" in shown
        and "0.250 (0.200 to 0.300)" in shown
        and "0.750 (0.700 to 0.800)" in shown
        and "90%" in shown
    )
    assert "lovely" in shown


def test_eighty_columns_are_enough_for_every_label() -> None:
    stream = io.StringIO()
    console = Console(True, Screen(file=stream, width=80, color_system=None))
    console.final_table(FIGURES | {"distinct_2": 0.5}, FIGURES | {"prompts": 256, "distinct_2": 0.5}, 0.75, [SAMPLE])
    rows = stream.getvalue().splitlines()
    assert rows[0].startswith("before and after, on 256 held-out prompts")
    for label in (
        "reward, sampled (95 %)",
        "KL from base, nats/token",
        "distinct pairs of tokens",
        "tuned wins, ties half",
    ):
        assert sum(label in row for row in rows) == 1, label
    assert any(row.strip().startswith("It was") and "  lovely  0.900" in row for row in rows)


def test_text_of_a_model_cannot_control_the_terminal(screen: Callable[..., View]) -> None:
    console, output = screen(terminal=False)
    console.final_table(FIGURES, FIGURES, None, [SAMPLE])
    console.say(EVIL)
    console.rich.print(Text(EVIL), Panel(Text(EVIL), title=Text(EVIL)))
    assert not {"\x1b", "\x07", "\u202e"} & set(output()) and "[bold red]" in output()
    panel, drawn = screen(terminal=True)
    with panel.live(1):
        panel.sample("p", EVIL, 0.0)
    assert "\x1b]0;" not in drawn() and "\x1b[2J" not in drawn() and "[bold red]" in drawn()


def test_line_ends_are_seen() -> None:
    assert one_line("a\r\nb\tc\x00") == "a ⏎ b c\\x00"
    assert harmless("a\nb\tc\x9b\u202e\ud800\U000e0041é你") == "a\nb\tc\\x9b\\u202e\\ud800\\U000e0041é你"
