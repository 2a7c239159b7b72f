"""The command line: commands, nothing else. Heavy imports happen inside them, so that --help answers at once."""

import errno
import logging
import signal
import sys
import traceback
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from llm_dqn import cli_collect, cli_replay
from llm_dqn.errors import RunError, UserError
from llm_dqn.lock import refuse_if_running
from llm_dqn.signals import Stopped, leave
from llm_dqn.terminal import HarmlessHandler, any_script
from llm_dqn.terminal import hush as _hush
from llm_dqn.terminal import say as _say

T = TypeVar("T", int, float)

app = typer.Typer(
    help="Deep Q-learning that fine-tunes a language model against a reward. Begin with: llm-dqn train quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="The shipped recipes.", invoke_without_command=True, rich_markup_mode=None)
app.add_typer(recipes_app, name="recipes")
app.add_typer(cli_replay.app, name="replay")
app.command()(cli_collect.collect)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="Overrides by dotted path, such as train.max_steps=100."),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, an adapter, a Hub adapter or a plain model.")]


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest complete checkpoint.")] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="With --resume: let this setting change all the same; again for each."),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --resume: from this one, such as step-000100.")
    ] = None,
    replay_repair: Annotated[
        bool, typer.Option("--replay-repair", help="With --resume: drop stored episodes whose file is damaged.")
    ] = False,
    num_processes: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
) -> None:
    """Train: write, score, remember, learn."""
    from llm_dqn.recipe import load_recipe

    needing = {"--checkpoint": checkpoint, "--replay-repair": replay_repair, "--allow-change": allow_change}
    if not resume and any(needing.values()):
        raise UserError(f"{next(flag for flag in needing if needing[flag])} needs --resume beside it")
    loaded = load_recipe(recipe, overrides or ())
    refuse_if_running(Path(loaded.train.output_dir))
    _look_for_the_hub(loaded.sources, loaded.folder)
    if num_processes > 1:
        from llm_dqn.launch import launch_processes

        again = ["train", recipe, *(overrides or ()), *(["--resume"] if resume else [])]
        again += [f"--allow-change={key}" for key in allow_change or ()]
        again += [f"--checkpoint={checkpoint}"] if checkpoint else []
        again += ["--replay-repair"] if replay_repair else []
        sys.exit(launch_processes(num_processes, again))
    from llm_dqn.trainer import DQNTrainer

    _hush()
    DQNTrainer.from_recipe(loaded).train(checkpoint or resume, allow_change or (), replay_repair)


@app.command()
def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    no_import: Annotated[
        bool, typer.Option("--no-import", help="Run no code that comes with the recipe: for strangers' recipes.")
    ] = False,
) -> None:
    """Validate everything without training: keys, data, model, rewards, sizes, one rollout and one update."""
    from llm_dqn.recipe import RecipeError, in_file_order, load_recipe_partially

    loaded, problems = load_recipe_partially(recipe, overrides or ())
    lines: list[str] = []
    if loaded is not None:
        _look_for_the_hub(loaded.sources, loaded.folder)
        from llm_dqn.preflight import preflight

        _hush()
        more, lines = preflight(loaded, run_code=not no_import)
        problems += more
    for line in lines:
        _say(line)
    if problems:
        raise RecipeError(in_file_order(problems))
    _say("ok")


@app.command()
def generate(
    run: Run,
    prompts: Annotated[str, typer.Option(help="File with a prompt a row: JSONL, CSV or Parquet.")],
    output: Annotated[str, typer.Option(help="JSONL to write: prompt, completion.")],
    greedy: Annotated[bool, typer.Option("--greedy", help="The likeliest token always, instead of sampling.")] = False,
    beta_scale: Annotated[
        float | None,
        typer.Option(
            help="How far to follow what was learned: 0 = base model, 1 = tuned, 2 = twice, -1 = away from it."
        ),
    ] = None,
    max_completion_length: Annotated[int | None, typer.Option(min=1, help="Length cap in tokens.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
) -> None:
    """Write completions of a file of prompts."""
    _look_for_the_hub(_sources_behind(run))
    from llm_dqn.inference import generate_file

    _hush()
    count = generate_file(
        run,
        prompts,
        output,
        greedy=greedy,
        beta_scale=beta_scale,
        max_completion_length=max_completion_length,
        seed=seed,
    )
    _say(f"{count} completions written to {output}")


@app.command()
def evaluate(
    run: Run,
    prompts: Annotated[str | None, typer.Option(help="Held-out prompts; a run folder knows its own.")] = None,
    output: Annotated[str | None, typer.Option(help="JSON to write.")] = None,
    rewards: Annotated[
        list[str] | None, typer.Option(help="Reward as in a recipe, again for each; a run folder knows its own.")
    ] = None,
    max_prompts: Annotated[int | None, typer.Option(min=1, help="Use at most this many prompts.")] = None,
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", "--seed", help="Seeds of the sampling, such as 0,1,2; a run folder knows its own."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="validation (default), test or train prompts of the run; or of --prompts.")
    ] = None,
    beta_scales: Annotated[
        str | None, typer.Option(help="Also measure reward and KL at these strengths, such as 0.5,1.5,2.")
    ] = None,
) -> None:
    """Measure base against tuned on held-out prompts."""
    drawn = None if seeds is None else _numbers("--seeds", seeds, int)
    scales = [] if beta_scales is None else _numbers("--beta-scales", beta_scales, float)
    _look_for_the_hub([*_sources_behind(run), *(rewards or ())])
    from llm_dqn.console import Console
    from llm_dqn.evaluation import side_by_side
    from llm_dqn.inference import evaluate_run, keep_strength

    _hush()
    report, pairs = evaluate_run(
        run,
        prompts=prompts,
        output=output,
        reward_specs=rewards or (),
        seeds=drawn,
        max_prompts=max_prompts,
        split=split,
        beta_scales=scales,
    )
    Console().evaluation(report, side_by_side(pairs))
    kept = keep_strength(run, report) if scales else None
    if kept:
        _say(f"the curve is in {kept} now, and `llm-dqn report {run}` draws it")


@app.command()
def score(
    run: Run,
    input: Annotated[str, typer.Option(help="Prompts and completions: JSONL, CSV or Parquet.")],
    output: Annotated[str, typer.Option(help="JSONL to write: rewards, and Q, V and advantage of every token.")],
    html: Annotated[str | None, typer.Option(help="Also draw a heat map of the tokens.")] = None,
    max_html: Annotated[int, typer.Option(min=1, help="Completions in the heat map: the first so many.")] = 50,
    rewards: Annotated[
        list[str] | None, typer.Option(help="Reward as in a recipe, again for each; a run folder knows its own.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="The base's likeliest tokens listed for each token.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Completions in one pass of the model.")] = 64,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be scored.")] = False,
) -> None:
    """Say what given completions are worth, and each of their tokens."""
    _look_for_the_hub([*_sources_behind(run), *(rewards or ())])
    from llm_dqn.recipe import resolve_path
    from llm_dqn.row_stream import RowStream
    from llm_dqn.score_files import Scorer, check_output, score_file

    _hush()
    check_output("--output", output, input)
    if html is not None:
        check_output("--html", html, input)
    tell = partial(_say, err=True)
    scorer = Scorer(run, RowStream(resolve_path(input)), rewards or None, batch_size, top, strict, tell)
    summary = score_file(scorer, output, html, max_html)
    mean = "" if summary.mean_reward is None else f", mean reward {summary.mean_reward:.4g}"
    left_out = f", {summary.left_out} rows left out" if summary.left_out else ""
    _say(f"{summary.scored} completions scored{mean}{left_out}, written to {output}")


@app.command()
def report(run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, finished or not.")]) -> None:
    """Draw a run: curves, samples, heat maps and warning signs in one HTML file, report.html."""
    from llm_dqn.report import write_report

    _say(str(write_report(Path(run))))


@app.command()
def merge(
    run: Run,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")],
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto (the base model's), float32, bfloat16 or float16.")
    ] = "auto",
) -> None:
    """Write base + adapter as one plain Hugging Face model, proven equal before it is written."""
    _look_for_the_hub(_sources_behind(run))
    from llm_dqn.merge import merge as merge_run

    _hush()
    merge_run(run, out, dtype, _say)


@app.command()
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, adapter or merged model on this machine.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name on the Hugging Face Hub.")],
    public: Annotated[bool, typer.Option("--public", help="Readable by everybody; private otherwise.")] = False,
    merged: Annotated[
        bool, typer.Option("--merged", help="Merge first, into RUN/merged, and push that model.")
    ] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base model, where the run was trained from a folder.")
    ] = None,
    branch: Annotated[str | None, typer.Option(help="Branch of the repository; made when it is missing.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and send nothing.")] = False,
) -> None:
    """Upload the adapter with its model card; replay, optimizer and samples stay here."""
    from llm_dqn.bundle import check_repo_id

    check_repo_id("REPO_ID", repo_id)
    if merged:
        _look_for_the_hub(_sources_behind(run))
        from llm_dqn.merge import merge_beside

        _hush()
        run = merge_beside(run, _say)
    from llm_dqn.hub import push as push_run

    push_run(run, repo_id, public=public, base_model=base_model, branch=branch, dry_run=dry_run, say=_say)


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the shipped recipes, or show or copy one."""
    if context.invoked_subcommand is None:
        list_recipes()


@recipes_app.command("ls")
def list_recipes() -> None:
    """Name and purpose of each."""
    from llm_dqn.recipe import shipped_recipes

    for name, path in shipped_recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0]
        _say(f"{name:<14} {first.removeprefix('#').strip()}")


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print one."""
    from llm_dqn.recipe import find_recipe

    _say(find_recipe(name)[1], nl=False)


@recipes_app.command("cp")
def copy_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    path: Annotated[str, typer.Argument(metavar="PATH", help="File or folder; nothing is overwritten.")],
) -> None:
    """Copy one, to change it."""
    from llm_dqn.recipe import copy_recipe

    copied = copy_recipe(name, path)
    _say(f"{copied} written; start it with: llm-dqn train {copied}")


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Also look at a folder or Hub id.")] = None,
) -> None:
    """Say what this machine has, and whether a model can be used."""
    _look_for_the_hub([model] if model else [])
    from llm_dqn.doctor import examine

    for line in examine(model):
        _say(line)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors that complete and check YAML."""
    import json

    from llm_dqn.recipe import Recipe

    _say(json.dumps(Recipe.model_json_schema(), indent=2))


def _numbers(option: str, text: str, kind: type[T]) -> list[T]:
    """'0,1,2' as numbers. UserError where one is not."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{option} {text}: expected {what} with commas between, such as 0,1,2") from error


def _look_for_the_hub(names: Iterable[str], recipe_dir: Path | None = None) -> None:
    """Says at once when something must come from the Hub and the Hub is out of reach. Before any heavy import."""
    from llm_dqn.offline import keep_to_cache_when_offline

    if keep_to_cache_when_offline(names, recipe_dir):
        _say("the Hugging Face Hub is out of reach: only what is in its cache can be opened", err=True)


def _sources_behind(run: str) -> list[str]:
    """What opening a run folder, an adapter or a model may need."""
    from llm_dqn.recipe import load_recipe

    recipe = Path(run) / "recipe.yaml"
    return [run, *(load_recipe(recipe).sources if recipe.is_file() else [])]


def _speak_plainly() -> None:
    """Warnings of this package and tracebacks reach the terminal harmless, too, and every terminal can show them."""
    any_script()
    package = logging.getLogger("llm_dqn")
    if not package.handlers:
        package.addHandler(HarmlessHandler(logging.WARNING))
    sys.excepthook = lambda *bug: _say("".join(traceback.format_exception(*bug)), err=True, nl=False)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. Exits with 0 (good), 1 (the run failed), 2 (wrong input), 130 or 143 (stopped by a signal)."""
    _speak_plainly()
    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        app(args=arguments, prog_name="llm-dqn")
    except UserError as error:
        _say(str(error), err=True)
        sys.exit(2)
    except RunError as error:
        _say(f"{error.heading}: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _say(f"the run failed: {error}", err=True)  # the disk is full
        sys.exit(1)
    except Stopped as stop:
        sys.exit(stop.code)
    finally:  # a launcher's signal to one that leaves already must not be heard as an error of its last moments
        for number, handler in before.items():
            signal.signal(number, handler)
