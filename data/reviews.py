"""Writes made-up reviews of restaurants, books and trips from the grammar files, each sentence with its known mood.

A mood is a number: above 0 praise, below 0 complaint, 0 neutral. `Review.score` turns the sum into a probability.
"""

import math
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

GRAMMAR = Path(__file__).parent / "grammar"
HEADER = re.compile(r"\[(\w+)(?: ([+-]?\d+(?:\.\d+)?))?(?: (\w+))?\]")
CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")
SLOT = re.compile(r"\{(\w+)\}")
NAME_LISTS = {"first", "adj", "noun", "last", "place", "hero", "heroine", "guide", "agency"}
PERSONS = {"first", "last", "hero", "heroine", "guide"}
INVENTED_SHARE = 0.12  # names nobody bears, so that a model learns to repeat a name it never saw
STARTS = "Bel Tor Mar Lin Sol Ka Ve Dor Al Ri No Ga Fen Hal Bri Cor Ed Is Jo Lu Pe Zo Wen Tal"
MIDDLES = "va mi ri do la ne gar der li be"
ENDS = "n ra no ston ley lia s ta ko rick da vik mond sa tte"
HELD_OUT_SHARE = 0.15  # the tail of every list of names is kept for the held-out prompts and tests
SCORE_SCALE = 1.1
Key = TypeVar("Key")

ASPECTS = {
    "restaurants": ["ordered", "wait", "food", "food", "service", "service", "room", "sweet", "price", "facts"],
    "books": ["facts", "plot", "plot", "people", "people", "style", "depth", "length", "ending"],
    "trips": ["travel", "room", "staff", "staff", "weather", "sights", "sights", "meals", "cost", "facts"],
}
NEUTRAL_ASPECTS = {"ordered", "facts"}
MOODS = {"praise": 0.29, "mostly_praise": 0.10, "balanced": 0.10, "mostly_complaint": 0.13, "complaint": 0.38}
CLAUSE_COUNTS = {2: 0.22, 3: 0.34, 4: 0.28, 5: 0.16}


@dataclass(frozen=True)
class Sentence:
    """One sentence, or a joined pair, with its mood; `stub` is a neutral beginning of it, or empty."""

    text: str
    mood: float
    stub: str = ""


@dataclass(frozen=True)
class Review:
    """A neutral opening and the sentences that judge."""

    opening: str
    sentences: tuple[Sentence, ...]
    domain: str

    @property
    def text(self) -> str:
        return " ".join([self.opening, *(sentence.text for sentence in self.sentences)])

    @property
    def score(self) -> float:
        return mood_to_score(sum(sentence.mood for sentence in self.sentences))


@dataclass
class Grammar:
    """Lists by (name, variant) and clauses, as (text, mood), by (aspect, sign, variant)."""

    lists: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    clauses: dict[tuple[str, int, str], list[tuple[str, float]]] = field(default_factory=dict)
    variants: list[str] = field(default_factory=list)


@dataclass
class Writer:
    """The state of one review while it is written: bound words, and what was used already."""

    grammar: Grammar
    rng: random.Random
    held_out: bool
    variant: str
    bound: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    menu: dict[str, list[str]] = field(default_factory=dict)

    def pick(self, name: str) -> str:
        """A word of the list `name`, new to this review where the list allows it."""
        if name in self.menu:
            return self.rng.choice(self.menu[name])
        words = self.grammar.lists.get((name, self.variant)) or self.grammar.lists[(name, "")]
        if name in PERSONS and self.rng.random() < INVENTED_SHARE:
            return invent_name(self.rng)
        if name in NAME_LISTS:
            words = self._allowed_names(words)
        fresh = [word for word in words if word not in self.used] or words
        word = self.rng.choice(fresh)
        self.used.add(word)
        return word

    def _allowed_names(self, words: list[str]) -> list[str]:
        cut = len(words) - max(1, round(HELD_OUT_SHARE * len(words)))
        if self.held_out and self.rng.random() < 0.6:
            return words[cut:]
        return words[:cut]

    def fill(self, template: str) -> str:
        """The template with every slot and choice filled; choices first, so that they may hold slots."""
        text = template
        while CHOICE.search(text):
            text = CHOICE.sub(lambda match: self.rng.choice(match[1].split("|")), text)
        while SLOT.search(text):
            text = SLOT.sub(lambda match: self.bound.get(match[1]) or self.fill(self.pick(match[1])), text, count=1)
        return re.sub(r"\b([aA]) (?=[aeiouAEIOU])(?!one\b|uni|Euro)", r"\1n ", text)

    def clause(self, aspect: str, sign: int) -> tuple[str, float]:
        """A clause about the aspect in the mood of the sign, not capitalised, `^` still in it."""
        found = self.grammar.clauses
        clauses = found.get((aspect, sign, ""), []) + found.get((aspect, sign, self.variant), [])
        fresh = [clause for clause in clauses if clause[0] not in self.used] or clauses
        template, mood = self.rng.choice(fresh)
        self.used.add(template)
        return self.fill(template), mood


def mood_to_score(mood: float) -> float:
    """The probability that a text of this summed mood is praise."""
    return 1.0 / (1.0 + math.exp(-SCORE_SCALE * mood))


def invent_name(rng: random.Random) -> str:
    """A person's name put together from syllables."""
    start, end = rng.choice(STARTS.split()), rng.choice(ENDS.split())
    middle = rng.choice(MIDDLES.split()) if len(start + end) < 5 or rng.random() < 0.5 else ""
    return start + middle + end


def weighted(rng: random.Random, weights: dict[Key, float]) -> Key:
    """A key of `weights`, drawn in proportion to its value."""
    return rng.choices(list(weights), list(weights.values()))[0]


def load_grammar(domain: str) -> Grammar:
    """Reads the grammar file of the domain and the words all domains share."""
    grammar = Grammar()
    for name in ("common", domain):
        target: list = []
        is_clause, weight = False, 0.0
        for line in (GRAMMAR / f"{name}.txt").read_text(encoding="utf-8").splitlines():
            if not line or line.startswith("#"):
                continue
            header = HEADER.fullmatch(line)
            if header is None:
                target.append((line, weight) if is_clause else line)
                continue
            title, number, variant = header[1], header[2], header[3] or ""
            is_clause, weight = number is not None, float(number or 0)
            if is_clause:
                target = grammar.clauses.setdefault((title, (weight > 0) - (weight < 0), variant), [])
            else:
                target = grammar.lists.setdefault((title, variant), [])
            if variant and variant not in grammar.variants:
                grammar.variants.append(variant)
    return grammar


GRAMMARS = {domain: load_grammar(domain) for domain in ASPECTS}


def capitalise(text: str) -> str:
    """The text with a capital first letter, and after every full stop inside it."""
    return re.sub(r"(?:^|(?<=[.!?] ))[a-z]", lambda match: match[0].upper(), text)


def bind_names(writer: Writer, domain: str) -> None:
    """Fixes the words that must stay the same through one review."""
    rng, bound = writer.rng, writer.bound
    group = domain != "books" and rng.random() < 0.7
    bound.update({"we": "we", "us": "us", "our": "our"} if group else {"we": "I", "us": "me", "our": "my"})
    bound["i"] = "I"
    if domain == "restaurants":
        bound["kind"] = writer.pick("kind")
        patterns = ["{first}'s", "{first}'s", "The {adj} {noun}", "The {adj} {noun}", "The {noun}", "Café {first}"]
        writer.menu = {name: rng.sample(writer.grammar.lists[(name, writer.variant)], 2) for name in ("dish", "dishes")}
        bound["name"] = writer.fill(rng.choice(patterns))
    elif domain == "books":
        patterns = ["The {adj} {noun}", "The {adj} {noun}", "The {noun}", "The {noun} and the {noun}", "A {adj} {noun}"]
        bound["title"] = writer.fill(rng.choice(patterns))
        bound["author"] = writer.fill("{first} {last}")
        kind, him, his = rng.choice([("hero", "him", "his"), ("heroine", "her", "her")])
        bound.update(who=writer.pick(kind), him=him, his=his, genre=writer.pick("genre"), job=writer.pick("job"))
        bound["friend"] = writer.pick("hero" if kind == "heroine" else "heroine")
    else:
        for name in ("place", "stay", "tour", "agency", "guide", "length_of"):
            bound[name] = writer.pick(name)


def plan_clauses(rng: random.Random, domain: str, mood: str, count: int) -> list[tuple[str, int]]:
    """What the review will speak about, and in which sign, in order."""
    aspects = ASPECTS[domain]
    order = sorted(rng.sample(range(len(aspects)), count))
    if order[0] != 0 and rng.random() < 0.35:
        rng.shuffle(order)
    main = {"praise": 1, "mostly_praise": 1, "complaint": -1, "mostly_complaint": -1}.get(mood, rng.choice([1, -1]))
    signs = [main] * count
    if mood == "balanced":
        turn = max(1, count // 2)
        signs = [main] * turn + [-main] * (count - turn)
        if rng.random() < 0.4:
            signs = [main if position % 2 == 0 else -main for position in range(count)]
    elif mood.startswith("mostly"):
        signs[rng.randrange(count)] = -main
    plan = [(aspects[i], 0 if aspects[i] in NEUTRAL_ASPECTS else sign) for i, sign in zip(order, signs, strict=True)]
    if mood != "balanced":
        if rng.random() < 0.3:
            plan.insert(0 if rng.random() < 0.35 else len(plan), ("verdict", main))
        if rng.random() < 0.6:
            plan.append(("close", main))
    elif rng.random() < 0.5:
        plan.append(("close", 0))
    return plan


def make_sentence(text: str, mood: float, prefix: str = "") -> Sentence:
    """A finished sentence out of a clause, with a connective before it where one is given."""
    if text.startswith("!"):
        return Sentence(capitalise(text[1:]), mood)
    whole = f"{prefix} {text}" if prefix else text
    head = whole.split("^")[0]
    stub = capitalise(head) if head != whole and not prefix and "," not in head else ""
    return Sentence(capitalise(whole.replace("^", "")) + ".", mood, stub)


def join_pair(rng: random.Random, first: tuple[str, float], second: tuple[str, float]) -> Sentence | None:
    """Two clauses as one sentence, or None where they had better stay apart."""
    (left, mood_left), (right, mood_right) = first, second
    if left.startswith("!") or right.startswith("!") or len(left) + len(right) > 120:
        return None
    same = mood_left * mood_right > 0
    if same and rng.random() < 0.3:
        return make_sentence(f"{left}, and {right}", mood_left + mood_right)
    if mood_left * mood_right < 0 and rng.random() < 0.5:
        if rng.random() < 0.65:
            return make_sentence(f"{left}, but {right}", 0.7 * mood_left + mood_right)
        return make_sentence(f"although {left}, {right}".replace("^", ""), 0.6 * mood_left + mood_right)
    return None


def connective(writer: Writer, before: float, now: float) -> str:
    """A linking word that fits the turn from the mood before to the mood now; often none."""
    if before * now < 0:
        chance, name = 0.65, "up" if now > 0 else "down"
    else:
        chance, name = 0.22 if before * now > 0 else 0.0, "more_good" if now > 0 else "more_bad"
    return writer.pick(name) if writer.rng.random() < chance else ""


def write_body(writer: Writer, plan: list[tuple[str, int]]) -> tuple[Sentence, ...]:
    """The judging sentences of the plan, some of them joined in pairs."""
    clauses = [writer.clause(aspect, sign) for aspect, sign in plan]
    sentences: list[Sentence] = []
    position, before = 0, 0.0
    while position < len(clauses):
        pair = join_pair(writer.rng, *clauses[position : position + 2]) if position + 1 < len(clauses) else None
        if pair is not None:
            sentences.append(pair)
            position += 2
            before = clauses[position - 1][1]
            continue
        text, mood = clauses[position]
        prefix = "" if text.startswith("!") else connective(writer, before, mood)
        sentences.append(make_sentence(text, mood, prefix))
        before = mood or before
        position += 1
    return tuple(sentences)


def write_review(rng: random.Random, held_out: bool = False, mood: str | None = None) -> Review:
    """A review; with `held_out`, names that no training text knows may occur in it."""
    domain = rng.choice(list(ASPECTS))
    grammar = GRAMMARS[domain]
    writer = Writer(grammar, rng, held_out, rng.choice(grammar.variants or [""]))
    bind_names(writer, domain)
    template = writer.pick("open")
    opening = capitalise(writer.fill(template))
    count = weighted(rng, CLAUSE_COUNTS)
    plan = plan_clauses(rng, domain, mood or weighted(rng, MOODS), count)
    if "{ordered}" in template:
        plan = [item for item in plan if item[0] != "ordered"]
    return Review(opening, write_body(writer, plan), domain)
