"""The model card of an adapter: what it is, how it was made, what was measured, how to open it."""

from typing import Any

import yaml


def model_card(base_model: str, recipe_text: str, report: dict[str, Any] | None = None) -> str:
    """Markdown with the metadata block that the Hub reads. `report`: the content of `evaluation.json`, if any."""
    metadata = {
        "base_model": base_model,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["llm-dqn", "dqn", "q-learning", "reinforcement-learning", "lora"],
    }
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return (
        f"---\n{front}---\n\n"
        f"# {base_model.rstrip('/').rsplit('/', 1)[-1]}, tuned by deep Q-learning\n\n"
        f"`{base_model}` fine-tuned against a reward on whole completions with llm_dqn: the text so far is the state, "
        "the next token the action.\n\n"
        f"{_results(report)}"
        "## Use\n\n"
        "```python\n"
        "from peft import AutoPeftModelForCausalLM\n"
        "from transformers import AutoTokenizer\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("PATH_OR_ID_OF_THIS_ADAPTER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID_OF_THIS_ADAPTER")\n'
        "```\n\n"
        "`q_head.safetensors` holds the value head; it is needed for scoring texts, not for writing them.\n\n"
        "## Limits\n\n"
        "The model was tuned towards one reward and is no better than that reward. Look at the samples before you "
        "trust the figures.\n\n"
        f"## Recipe\n\n```yaml\n{recipe_text.strip()}\n```\n"
    )


def _results(report: dict[str, Any] | None) -> str:
    if report is None:
        return ""
    rows = [
        ("reward, sampled", "reward"),
        ("reward, greedy", "reward_greedy"),
        ("KL to the base, nats a token", "kl"),
        ("perplexity under the base", "perplexity"),
        ("length, tokens", "length"),
        ("distinct 2-grams", "distinct_2"),
    ]
    lines = ["## Measured on held-out prompts\n", "| | base | tuned |", "|---|---|---|"]
    for label, key in rows:
        cells = [f"{report[side][key]:.3f}" + _interval(report[side], key) for side in ("base", "tuned")]
        lines.append(f"| {label} | {cells[0]} | {cells[1]} |")
    lines.append(
        f"\n{report['tuned']['prompts']} prompts, one sampled completion each; intervals: 95 % bootstrap over prompts. "
        f"The tuned completion scores higher on {report['win_rate']:.0%} of them, ties counting half.\n\n"
    )
    return "\n".join(lines)


def _interval(figures: dict[str, Any], key: str) -> str:
    return f" ({figures['reward_ci'][0]:.3f} to {figures['reward_ci'][1]:.3f})" if key == "reward" else ""
