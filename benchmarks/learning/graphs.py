"""Two tasks on graphs: shortest paths on one random graph, and star graphs whose right arm must be picked at once."""

import random
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

from benchmarks.learning.bases import BaseRecipe, base_model

# --- shortest paths: the toy on which Decision Transformer and ILQL were shown ----------------------------------------

NODES = 21
WALK = 10  # steps at most
PATHS = BaseRecipe(
    "paths",
    {"nodes": NODES, "walk": WALK, "degree": 3, "graph_seed": 3, "directed": 0.05},
    (*map(str, range(NODES)), ":"),
    steps=700,
)


@cache
def neighbours() -> dict[int, tuple[int, ...]]:
    """A connected undirected graph: a ring in random order, and random chords until the mean degree is reached."""
    rng = random.Random(PATHS.parameters["graph_seed"])
    order = rng.sample(range(NODES), NODES)
    edges = {frozenset(pair) for pair in pairwise([*order, order[0]])}
    while len(edges) < NODES * PATHS.parameters["degree"] / 2:
        edges.add(frozenset(rng.sample(range(NODES), 2)))
    return {
        node: tuple(sorted(other for edge in edges if node in edge for other in edge - {node})) for node in range(NODES)
    }


@cache
def distances(goal: int) -> dict[int, int]:
    """Steps from every node to the goal."""
    found, ring = {goal: 0}, [goal]
    for node in ring:  # grows while it is walked
        fresh = [other for other in neighbours()[node] if other not in found]
        found.update(dict.fromkeys(fresh, found[node] + 1))
        ring += fresh
    return found


def _random_walk(rng: random.Random) -> str:
    """A random walk that ends where it meets its goal; mostly the goal is any node, at times where the walk ended."""
    start, goal = rng.sample(range(NODES), 2)
    walk = [start]
    while len(walk) <= WALK and walk[-1] != goal:
        walk.append(rng.choice(neighbours()[walk[-1]]))
    if rng.random() < PATHS.parameters["directed"]:
        walk = walk[: rng.randint(2, len(walk))]
        goal = walk[-1]
        walk = walk[: walk.index(goal) + 1] if goal != start else [start, *walk[1:2]]
        goal = walk[-1]
    return f"{goal} {start} : {' '.join(map(str, walk[1:]))}"


PATHS_BASE = base_model(PATHS, _random_walk)


def path_rows(seed: int) -> Iterator[dict[str, str]]:
    """Every pair of nodes at least two steps apart, once, in random order: `prompt` is "goal start :"."""
    pairs = [(goal, start) for goal in range(NODES) for start in range(NODES) if distances(goal)[start] >= 2]
    random.Random(seed).shuffle(pairs)
    for goal, start in pairs:
        yield {"prompt": f"{goal} {start} :"}


def optimality(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Length of a shortest path over the length of the walk; 0 where it is no walk, passes on, or misses the goal."""
    return [_optimality(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


def _optimality(prompt: str, text: str) -> float:
    goal, start = map(int, prompt.split()[:2])
    if not all(word.isdigit() for word in text.split()):
        return 0.0
    walk = [start, *map(int, text.split())]
    if any(after not in neighbours()[before] for before, after in pairwise(walk)):
        return 0.0
    return distances(goal)[start] / (len(walk) - 1) if walk[-1] == goal and len(walk) > 1 else 0.0


def shortest_paths(row: dict[str, Any]) -> list[str]:
    """All shortest paths of a row."""
    goal, start = map(int, row["prompt"].split()[:2])
    found = [[start]]
    for step in range(distances(goal)[start]):
        left = distances(goal)[start] - step - 1
        found = [
            [*path, node] for path in found for node in neighbours()[path[-1]] if distances(goal).get(node) == left
        ]
    return [" ".join(map(str, path[1:])) for path in found]


# --- star graphs ------------------------------------------------------------------------------------------------------

ARMS = 5
NAMES = 30
STAR = BaseRecipe(
    "star",
    {"arms": ARMS, "names": NAMES, "first": 0.4, "to_the_goal": 0.15, "unread": 3 * ARMS + 1},
    (*map(str, range(NAMES)), "|", ":"),
    steps=600,
)


def _star(rng: random.Random) -> tuple[str, list[list[int]], int]:
    """(prompt, arms, which arm has the goal): arms of two nodes from a nameless centre, behind the colon the goal."""
    names = rng.sample(range(NAMES), 2 * ARMS)
    arms = [names[2 * arm : 2 * arm + 2] for arm in range(ARMS)]
    right = rng.randrange(ARMS)
    return f"{' | '.join(f'{one} {other}' for one, other in arms)} : {arms[right][1]}", arms, right


def _star_text(rng: random.Random) -> str:
    """The habit is to walk the first arm that was named; at times the goal's, else any."""
    prompt, arms, right = _star(rng)
    first, to_the_goal = STAR.parameters["first"], STAR.parameters["to_the_goal"]
    (arm,) = rng.choices((0, right, rng.randrange(ARMS)), (first, to_the_goal, 1 - first - to_the_goal))
    return f"{prompt} {arms[arm][0]} {arms[arm][1]}"


STAR_BASE = base_model(STAR, _star_text)


def star_rows(seed: int) -> Iterator[dict[str, str]]:
    """Endless rows: prompt, and the way to the goal as `answer`."""
    rng = random.Random(seed)
    while True:
        prompt, arms, right = _star(rng)
        yield {"prompt": prompt, "answer": " ".join(map(str, arms[right]))}


def is_answer(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 where the completion is the answer, else 0."""
    return [float(text.split() == right.split()) for text, right in zip(completions, answer, strict=True)]
