"""Imports only point down, heavy libraries stay in their files, and nothing is ever unpickled."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llm_dqn"

# From top to bottom. A file may import what lies on lines below its own, and nothing beside or above.
LAYERS = """
__main__
cli
cli_replay cli_collect
score_files
overlap_worker
doctor preflight inference merge collector replay_export replay_statistics
trainer
intake
rewards_seen
trainer_state learner examiner
shared_folder overlap
judging inputs
assembly score_rows logbook hub replay_browser exchange
bundle saver
evaluation scoring checkpoint launch card opening early_stopping trust_region
sharding logged prompt_sources
rollout strength objective dyna sharpening
engines
network rewards
policy_network
adapters policy replay reward_cache row_stream data metrics console reward_functions report
heads states vocabulary token_texts heatmap report_charts episode_store reward_model reward_worker isolation
hidden_cache outcome_model tables models pages run_files calibration warning_signs priority_tree
targets losses attempts schedules recipe charts statistics references processes reduction memory numerics resume
offline recipe_changes reward_scale reward_kinds
recipe_problems recipe_sections shipped
vllm_launch
recipe_yaml lock vllm_server vllm_guard
types errors terminal signals
"""
LEVEL = {name: -depth for depth, line in enumerate(LAYERS.split("\n")) for name in line.split()}

# library -> files that may import it
KEPT_IN = {
    "peft": {"adapters", "network", "hub", "merge"},
    "accelerate": {"assembly", "checkpoint", "launch", "logbook", "metrics", "trainer"},
    "typer": {"cli", "cli_replay", "cli_collect"},
    "rich": {"console"},
}
# files that may know configuration objects; all others take plain arguments
KNOW_CONFIGURATION = {
    "__init__",
    "cli",
    "trainer",
    "trainer_state",
    "rewards_seen",
    "inputs",
    "assembly",
    "preflight",
    "inference",
    "score_files",
    "doctor",
    "opening",
    "bundle",
    "replay_browser",
    "collector",
    "overlap_worker",
    "intake",
    "cli_collect",
    "prompt_sources",
}
RECIPE_FILES = {"recipe_changes", "offline", "recipe", "recipe_problems", "recipe_sections", "recipe_yaml", "shipped"}
PURE = {"targets", "losses", "schedules", "types"}

FILES = sorted(PACKAGE.glob("*.py"))
MODULES = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted module, line) of every import, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: imports are absolute"
            if node.module == "llm_dqn":
                yield from ((f"llm_dqn.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield str(node.module), node.lineno


def own(path: Path) -> Iterator[tuple[str, int]]:
    """(file of this package, line) of every import within the package."""
    for module, line in imports(path):
        if module.startswith("llm_dqn.") and (PACKAGE / f"{module.split('.')[1]}.py").exists():
            yield module.split(".")[1], line


@MODULES
def test_every_file_has_a_layer_and_imports_only_point_down(path: Path) -> None:
    if path.stem == "__init__":
        return
    assert path.stem in LEVEL, f"give {path.stem} a place in LAYERS"
    for name, line in own(path):
        assert LEVEL[name] < LEVEL[path.stem], f"{path.name}:{line}: {path.stem} may not import {name}"


@MODULES
def test_libraries_stay_in_their_files(path: Path) -> None:
    for module, line in imports(path):
        allowed = KEPT_IN.get(module.split(".")[0])
        assert allowed is None or path.stem in allowed, (
            f"{path.name}:{line}: {module} belongs in {sorted(allowed or ())}"
        )


@MODULES
def test_only_the_top_knows_configuration(path: Path) -> None:
    if path.stem not in KNOW_CONFIGURATION | RECIPE_FILES:
        known = [(name, line) for name, line in own(path) if name in RECIPE_FILES]
        assert not known, f"{path.name}: takes plain arguments, and imports {known}"


@pytest.mark.parametrize("name", sorted(PURE))
def test_the_mathematics_imports_torch_alone(name: str) -> None:
    standard = {"collections", "collections.abc", "dataclasses", "math", "typing", "llm_dqn.types"}
    outside = {module for module, _ in imports(PACKAGE / f"{name}.py") if module.split(".")[0] != "torch"}
    assert outside <= standard


@MODULES
def test_nothing_is_unpickled_and_no_strange_code_is_run(path: Path) -> None:
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    assert not {module.split(".")[0] for module, _ in imports(path)} & forbidden
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called, place = ast.unparse(node.func), f"{path.name}:{node.lineno}"
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert called not in ("eval", "exec", "register_for_checkpointing"), place
        assert called != "torch.load" or given.get("weights_only") == "True", f"{place}: torch.load unpickles"
        assert given.get("allow_pickle", "False") == "False", place
        assert given.get("trust_remote_code") != "True", place
        assert called not in ("yaml.load", "yaml.unsafe_load") or given.get("Loader") == "_Loader", place


def blocks(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@MODULES
def test_files_and_functions_stay_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, "split the file along its ideas"
    for function in blocks(path):
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length <= 60, f"{path.name}:{function.lineno}: {function.name} has {length} lines"
        names = [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]
        limit = 14 if function.name == "__init__" else 9  # self or cls counted; settings arrive in constructors
        assert len(names) <= limit, f"{path.name}:{function.lineno}: {function.name} takes {len(names)} arguments"


def test_no_bare_or_silent_except() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                silent = all(isinstance(line, ast.Pass) for line in node.body)
                assert node.type is not None and not silent, f"{path.name}:{node.lineno}: an error is swallowed"
