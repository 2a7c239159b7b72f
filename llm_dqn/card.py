"""The model card: what it is, how it was made, what was measured, how to open it, and what it cannot promise.

Metadata follows https://huggingface.co/docs/hub/model-cards; evaluation results go into `model-index` by way of
huggingface_hub's own classes.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

import yaml
from huggingface_hub import EvalResult, ModelCardData

from llm_dqn.charts import Axis, Series, line_chart

CURVE = "reward.svg"  # the Hub shows SVG pictures of a repository, so no drawing library is needed
TAGS = ["llm-dqn", "dqn", "q-learning", "reinforcement-learning"]
ROWS = (
    ("reward", "reward, sampled"),
    ("reward_greedy", "reward, greedy"),
    ("kl", "KL to the base, nats a token"),
    ("perplexity", "perplexity under the base"),
    ("length", "length, tokens"),
    ("distinct_1", "distinct 1-grams"),
    ("distinct_2", "distinct 2-grams"),
    ("bleu", "BLEU"),
    ("wer", "word error rate"),
)
Kind = Literal["adapter", "model", "merged"]
DATA_FILES = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Card:
    """Facts of a model card; nothing in it is invented, and what is missing is left out.

    place: folder or Hub id that the usage snippet opens. base_on_hub: whether others can fetch the base model by its
    name. recipe_text: the resolved recipe, its first lines being the versions. evaluation: `evaluation.json`.
    metrics: the lines of `metrics.jsonl`. license: `license` and what belongs to it, as the base model's card has them.
    proof: what merging was proven by.
    """

    place: str
    kind: Kind
    base: str
    base_on_hub: bool
    revision: str | None = None
    recipe_text: str = ""
    evaluation: Mapping[str, Any] | None = None
    metrics: Sequence[Mapping[str, Any]] = ()
    conversational: bool = False
    license: Mapping[str, str] = field(default_factory=dict)
    proof: Mapping[str, Any] | None = None

    @property
    def recipe(self) -> dict[str, dict[str, Any]]:
        """The recipe's sections; those that are missing or null are empty."""
        sections = yaml.safe_load(self.recipe_text) or {}
        names = {"model", "data", "rollout", "reward", "dqn", "replay", "train", *sections}
        return {name: sections.get(name) or {} for name in names}

    @property
    def name(self) -> str:
        """What it is called: the repository's name, or that of the run whose folder it lies in."""
        path = PurePath(self.place)
        return path.parent.name if path.name in ("adapter", "model", "merged") and path.parent.name else path.name

    @property
    def curve(self) -> str | None:
        """The reward against scored completions as SVG; None where there is nothing to draw."""
        drawn = [
            Series(label, [line["scored_completions"] for line in lines], [line[key] for line in lines])
            for key, label in (("rollout/reward", "while training"), ("eval/reward", "held-out prompts"))
            if (lines := [line for line in self.metrics if key in line and "scored_completions" in line])
        ]
        if not drawn:
            return None
        axes = Axis("scored completions"), Axis("reward")
        return line_chart(drawn, "Reward against scored completions", *axes, size=(720, 320), standalone=True)

    def markdown(self) -> str:
        """The whole README.md."""
        sections = [
            f"---\n{self._metadata().to_yaml()}\n---",
            f"# {self._title()}",
            self._summary(),
            self._use(),
            self._measured(),
            self._curve_section(),
            self._how_it_was_made(),
            self._proof_section(),
            self._limits(),
            f"## Recipe\n\n```yaml\n{self.recipe_text.strip()}\n```" if self.recipe_text else "",
        ]
        return "\n\n".join(section for section in sections if section) + "\n"

    def write(self, folder: Path) -> None:
        """Puts README.md, and the curve where there is one, into `folder`."""
        curve = self.curve
        (folder / "README.md").write_text(self.markdown(), encoding="utf-8")
        if curve is not None:
            (folder / CURVE).write_text(curve, encoding="utf-8")

    # --- metadata ---------------------------------------------------------------------------------------------------

    def _metadata(self) -> ModelCardData:
        data = str(self.recipe["data"].get("train", ""))
        adapter, results = self.kind == "adapter", self._results()
        more: dict[str, Any] = {"base_model_relation": "adapter" if adapter else "finetune"} if self.base_on_hub else {}
        return ModelCardData(
            **self.license,
            base_model=self.base if self.base_on_hub else None,
            library_name="peft" if adapter else "transformers",
            pipeline_tag="text-generation",
            tags=[*TAGS, "lora"] if self.kind != "model" else TAGS,
            datasets=data if _is_hub_dataset(data) else None,
            model_name=self.name if results else None,
            eval_results=results or None,
            **more,
        )

    def _results(self) -> list[EvalResult]:
        if not self.evaluation:
            return []
        tuned, data = self.evaluation["tuned"], self.recipe["data"]
        source = str(data.get("eval") or data.get("train") or "unknown")
        low, high = tuned.get("reward_ci") or (math.nan, math.nan)
        between = f" (95 % interval {low:.3f} to {high:.3f})" if math.isfinite(low + high) else ""
        figures = [
            ("reward", f"mean reward, sampled{between}", tuned.get("reward")),
            ("reward_greedy", "mean reward, greedy", tuned.get("reward_greedy")),
            ("win_rate", "share of prompts on which it beats the base", self.evaluation.get("win_rate")),
        ]
        return [
            EvalResult(
                task_type="text-generation",
                task_name="Text generation",
                dataset_type=source if _is_hub_dataset(source) else "prompts",
                dataset_name=f"{tuned.get('prompts', 'the')} held-out prompts of {_last(source)}",
                metric_type=key,
                metric_name=name,
                metric_value=round(value, 6),
            )
            for key, name, value in figures
            if value is not None and math.isfinite(value)
        ]

    # --- text -------------------------------------------------------------------------------------------------------

    def _title(self) -> str:
        return f"{self.name}: {_last(self.base)} tuned by deep Q-learning"

    def _summary(self) -> str:
        revision = f" at revision `{self.revision}`" if self.revision else ""
        where = "" if self.base_on_hub else ", a folder that is not on the Hub"
        kinds = {
            "adapter": "A LoRA adapter for",
            "model": "All weights tuned, starting from",
            "merged": "A LoRA adapter merged into",
        }
        return (
            f"{kinds[self.kind]} `{self.base}`{where}{revision}, tuned against a reward on whole completions with "
            "llm_dqn: the text so far is the state, the next token the action, and the tuned model writes what the "
            "learned Q-values prefer."
        )

    def _use(self) -> str:
        adapter = self.kind == "adapter"
        opener = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
        imports = (
            "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
            if adapter
            else "from transformers import AutoModelForCausalLM, AutoTokenizer"
        )
        if self.conversational:
            text = 'messages = [{"role": "user", "content": "Hello!"}]\n' + (
                "text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)\n"
                'inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)\n'
            )
        else:
            text = 'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        length = self.recipe["rollout"].get("max_completion_length", 64)
        heads = "\n\n`q_head.safetensors` holds the value head, which scoring texts needs and writing them does not."
        return (
            f"## Use\n\n```python\n{imports}\n\n"
            f'model = {opener}.from_pretrained("{self.place}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{self.place}")\n'
            f"{text}"
            'ids, mask = inputs["input_ids"], inputs["attention_mask"]\n'
            "output = model.generate(\n"
            f"    input_ids=ids, attention_mask=mask, max_new_tokens={length}, do_sample=True, top_k=0\n)\n"
            "print(tokenizer.decode(output[0, ids.shape[1]:], skip_special_tokens=True))\n```"
            f"{heads if self.kind != 'merged' else ''}"
        )

    def _measured(self) -> str:
        if not self.evaluation:
            return ""
        base, tuned = self.evaluation["base"], self.evaluation["tuned"]
        lines = ["## Measured on held-out prompts", "", "| | base | tuned |", "|---|---|---|"]
        for key, label in ROWS:
            if key in tuned and tuned[key] is not None:
                lines.append(f"| {label} | {_cell(base, key)} | {_cell(tuned, key)} |")
        seeds, share = self.evaluation.get("seeds"), self.evaluation.get("win_rate")
        won = (
            " The tuned model's sampled completion scores higher than the base's on {:.0%} of them, ties counting half."
        )
        wins = "" if share is None else won.format(share)
        lines.append(
            f"\n{tuned.get('prompts', '?')} prompts, one sampled and one greedy completion each"
            + (f", sampling seeds {', '.join(map(str, seeds))}" if seeds else "")
            + f"; intervals: 95 %, bootstrap over prompts.{wins}"
        )
        return "\n".join(lines)

    def _curve_section(self) -> str:
        return f"![Reward against scored completions]({CURVE})" if self.curve else ""

    def _how_it_was_made(self) -> str:
        if not self.recipe_text:
            return ""
        recipe = self.recipe
        train, reward, data = recipe["train"], recipe["reward"], recipe["data"]
        weights = reward.get("weights") or [None] * len(reward.get("funcs", []))
        sources = [
            f"`{name}`" + ("" if weight is None else f" (weight {weight})")
            for name, weight in zip(reward.get("funcs", []), weights, strict=False)
        ]
        scored = max((line.get("scored_completions", 0) for line in self.metrics), default=0)
        steps = max((line.get("step", 0) for line in self.metrics), default=0)
        rows = [
            ("run", train.get("run_name") or _last(str(train.get("output_dir", "")))),
            ("task", f"continue the prompts of `{data.get('train', '?')}`"),
            ("reward", ", ".join(sources)),
            ("Q-head", f"`{recipe['dqn'].get('q_head', '?')}`, beta {recipe['dqn'].get('beta', '?')}"),
            ("training", f"{steps} steps, {scored} scored completions" if steps else ""),
            ("seed", train.get("seed", "?")),
            ("versions", ", ".join(re.findall(r"^# (\S+ \S+)$", self.recipe_text, flags=re.MULTILINE))),
        ]
        return "## How it was made\n\n| | |\n|---|---|\n" + "\n".join(f"| {a} | {b} |" for a, b in rows if b != "")

    def _proof_section(self) -> str:
        if self.proof is None:
            return ""
        proof = self.proof
        rounding = ""
        if proof["dtype"] != "float32":
            rounding = (
                f" Rounding the weights to {proof['dtype']} afterwards changes logits by up to "
                f"{proof['rounding_difference']:.2g} of the largest, and {proof['rounding_greedy_equal']:.0%} of the "
                "greedy tokens stay the same."
            )
        return (
            "## Merged, and proven equal\n\n"
            f"Before it was written, the merged model was compared with base + adapter in float32 on {proof['probes']} "
            f"texts ({proof['real_texts']} of the run, the others random tokens; {proof['positions']} positions): "
            f"logits differ by at most {proof['relative_difference']:.2g} of the largest logit (allowed: "
            f"{proof['tolerance']:.0e}), and all {proof['greedy_tokens']} greedy tokens are equal.{rounding}"
        )

    def _limits(self) -> str:
        recipe = self.recipe
        lines = [
            "It was tuned towards one reward, and a higher reward is not a better text in any other respect.",
            "The figures are those of one training run; another seed gives others.",
        ]
        if length := recipe["rollout"].get("max_completion_length"):
            lines.append(f"It learned on completions of at most {length} tokens; beyond that nothing was measured.")
        if self.evaluation:
            base, tuned = self.evaluation["base"], self.evaluation["tuned"]
            lines.append(
                f"Against the base, completions went from {_cell(base, 'length')} to {_cell(tuned, 'length')} tokens "
                f"and distinct 2-grams from {_cell(base, 'distinct_2')} to {_cell(tuned, 'distinct_2')}: read samples "
                "before you trust the reward."
            )
        else:
            lines.append("Nothing was measured on held-out prompts.")
        lines.append("What is wrong with the base model, its biases included, is still there.")
        if not self.license:
            lines.append("No licence is stated, since none is known of the base model.")
        return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


# --- from files -----------------------------------------------------------------------------------------------------


def read_card(artefact: Path, run: Path, place: str, base: str, kind: Kind, recipe_text: str | None = None) -> Card:
    """The card of what lies in `artefact`, from the files of its run folder, whichever of them are there."""
    config, proof = _json(artefact / "adapter_config.json") or {}, _json(artefact / "merge.json")
    recipe_file = run / "recipe.yaml"
    if recipe_text is None:
        recipe_text = recipe_file.read_text(encoding="utf-8") if recipe_file.is_file() else ""
    return Card(
        place=place,
        kind=kind,
        base=base,
        base_on_hub=not Path(base).exists() and not base.startswith((".", "/", "~")),
        revision=config.get("revision") or (proof or {}).get("base_revision"),
        recipe_text=recipe_text,
        evaluation=_json(run / "evaluation.json"),
        metrics=_json_lines(run / "metrics.jsonl"),
        conversational=_is_conversational(run / "samples.jsonl"),
        license=license_of(Path(base) / "README.md"),
        proof=proof["proof"] if proof else None,
    )


def license_of(readme: Path) -> dict[str, str]:
    """`license` and what belongs to it from a model card on this machine; empty where none is stated."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    front = re.match(r"---\s*\n(.*?)\n---", text, flags=re.DOTALL)
    metadata = yaml.safe_load(front[1]) if front else None
    names = ("license", "license_name", "license_link")
    return {name: metadata[name] for name in names if name in metadata} if isinstance(metadata, dict) else {}


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _json_lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _is_conversational(samples: Path) -> bool:
    if not samples.is_file():
        return False
    with samples.open(encoding="utf-8") as stream:
        first = stream.readline()
    return bool(first.strip()) and not isinstance(json.loads(first)["prompt"], str)


def _is_hub_dataset(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not name.endswith(DATA_FILES) and not Path(name).exists()


def _last(path: str) -> str:
    return PurePath(path.rstrip("/")).name or path


def _cell(figures: Mapping[str, Any], key: str) -> str:
    value = figures.get(key)
    if value is None or not math.isfinite(value):
        return "not measured"
    if key != "reward" or "reward_ci" not in figures:
        return f"{value:.3f}"
    low, high = figures["reward_ci"]
    return f"{value:.3f} ({low:.3f} to {high:.3f})"
