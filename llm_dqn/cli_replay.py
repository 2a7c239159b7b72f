"""The commands of `llm-dqn replay`: what a run remembers."""

from typing import Annotated

import typer

from llm_dqn.terminal import say

app = typer.Typer(
    help="Look into the replay buffer of a run's newest checkpoint.", no_args_is_help=True, rich_markup_mode=None
)

Run = Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run.")]
Step = Annotated[
    str | None, typer.Option("--checkpoint", help="Such as step-000100, instead of the newest complete one.")
]
Sort = Annotated[str, typer.Option(help="By reward, age, td-error (highest first) or slot.")]
Lowest = Annotated[bool, typer.Option("--lowest", "--reverse", help="The other way round: lowest first.")]
Source = Annotated[str | None, typer.Option(help="Only what was written online, or only what was logged.")]
MinReward = Annotated[float | None, typer.Option(help="Leave out lower rewards.")]
MaxReward = Annotated[float | None, typer.Option(help="Leave out higher rewards.")]


@app.command()
def stats(run: Run, checkpoint: Step = None) -> None:
    """Say in figures what is remembered: rewards, age, sources, lengths, duplicates."""
    from llm_dqn.console import Console
    from llm_dqn.replay_browser import open_replay
    from llm_dqn.replay_statistics import described, statistics

    remembered = open_replay(run, checkpoint)
    console = Console()
    for line in [*remembered.skipped, f"{'checkpoint':<12} {remembered.folder}"]:
        console.say(line)
    for line in described(statistics(remembered), bar="█" if console.rich.encoding.startswith("utf") else "#"):
        console.say(line)


@app.command()
def show(
    run: Run,
    sort: Sort = "reward",
    lowest: Lowest = False,
    source: Source = None,
    min_reward: MinReward = None,
    max_reward: MaxReward = None,
    limit: Annotated[int, typer.Option(min=1, help="Episodes shown at most.")] = 20,
    checkpoint: Step = None,
) -> None:
    """List remembered episodes, one a line, cropped to the terminal's width."""
    from llm_dqn.console import Console
    from llm_dqn.replay_browser import Choice, chosen, open_replay, tokenizer_of
    from llm_dqn.replay_export import rows

    remembered = open_replay(run, checkpoint)
    places = chosen(remembered, Choice(sort, lowest, source, min_reward, max_reward))
    console = Console()
    for line in remembered.skipped:
        console.say(line)
    if len(places):
        console.episodes(list(rows(remembered, places[:limit], tokenizer_of(run))))
    console.say(
        f"{min(limit, len(places))} of {len(places)} episodes that fit, of {len(remembered)} in {remembered.folder}"
    )


@app.command()
def export(
    run: Run,
    output: Annotated[str, typer.Option(help="File to write: .parquet, .jsonl or .csv.")],
    sort: Sort = "slot",
    lowest: Lowest = False,
    source: Source = None,
    min_reward: MinReward = None,
    max_reward: MaxReward = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Episodes written at most.")] = None,
    checkpoint: Step = None,
) -> None:
    """Write remembered episodes as a data set, which `replay.warm_start` reads again."""
    from llm_dqn.replay_browser import Choice
    from llm_dqn.replay_export import export

    count = export(run, output, Choice(sort, lowest, source, min_reward, max_reward, limit), checkpoint)
    say(f"{count} episodes written to {output}")
