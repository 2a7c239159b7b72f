"""`llm-dqn collect`: rollout workers apart from the learner."""

from pathlib import Path
from typing import Annotated

import typer

from llm_dqn.terminal import hush, say


def collect(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="The learner's recipe, or its run folder.")],
    into: Annotated[str, typer.Option(metavar="FOLDER", help="The learner's rollout.collectors.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Overrides as the learner was given.")
    ] = None,
    budget: Annotated[int | None, typer.Option(min=1, help="Completions to have scored at most.")] = None,
) -> None:
    """Write and score completions for a learner that runs elsewhere, until it has finished.

    Start as many as there are machines; each leaves whole segments in FOLDER and follows the learner's policy. They may
    be killed and started at any time. With collectors a run does not repeat bit for bit: what is learned from depends
    on when segments arrive.
    """
    from llm_dqn.offline import keep_to_cache_when_offline
    from llm_dqn.recipe import load_recipe

    inside = Path(recipe) / "recipe.yaml"
    loaded = load_recipe(inside if inside.is_file() else recipe, overrides or ())
    if keep_to_cache_when_offline(loaded.sources, loaded.folder):
        say("the Hugging Face Hub is out of reach: only what is in its cache can be opened", err=True)
    from llm_dqn.collector import collect as work

    hush()
    scored = work(recipe, into, overrides or (), budget, say)
    say(f"{scored} completions scored into {into}")
