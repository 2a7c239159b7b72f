"""What may change in a recipe between the two halves of a run, and how a change is told.

Every setting stands in exactly one of three sets. A test holds that none is missing.
"""

from collections.abc import Sequence
from typing import Any

import yaml

from llm_dqn.errors import UserError, did_you_mean


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Nothing that is learned depends on these: the run goes on exactly.
HARMLESS = _names(
    """
    model.trust_remote_code model.use_safetensors reward.timeout
    reward.called_by rollout.vllm_url rollout.vllm_folder rollout.vllm_gpu_memory_utilization
    rollout.collector_timeout replay.storage
    data.test data.test_split
    train.output_dir train.max_steps train.max_scored_completions train.logging_steps train.eval_steps
    train.eval_prompts train.final_eval_prompts train.final_beta_scales train.save_steps train.save_total_limit
    train.report_to train.run_name train.max_nonfinite_steps
    """
)
# The run goes on, and from here on differs from one that had this from the start.
NOTED = _names(
    """
    model.attn_implementation
    rollout.engine rollout.num_generations rollout.prompts_per_collect rollout.temperature rollout.top_k rollout.top_p
    rollout.overlap rollout.collectors rollout.publish_steps replay.max_age
    rollout.min_p rollout.epsilon.start rollout.epsilon.end rollout.epsilon.steps rollout.explore
    reward.on_error reward.cache
    dqn.n_step dqn.lam dqn.corrected dqn.importance_sampling_cap dqn.loss dqn.target_sync_steps dqn.target_tau
    dqn.advantage_weight dqn.negative_weight dqn.negative_half_life dqn.cql_weight
    replay.imagined replay.sharpened
    replay.learning_starts replay.updates_per_collect replay.prioritized replay.success_share replay.success_odds
    replay.success_half_life
    replay.target_kl
    train.learning_rate train.value_learning_rate train.weight_decay train.max_grad_norm train.warmup_steps
    train.lr_scheduler_type train.per_device_train_batch_size train.gradient_accumulation_steps train.bf16
    train.gradient_checkpointing train.sharding train.hidden_cache_gb
    """
)
# What was saved means something else, or nothing, under another value of these.
REFUSED = _names(
    """
    model.model_name_or_path model.model_revision model.dtype
    lora.r lora.lora_alpha lora.lora_dropout lora.target_modules
    data.train data.eval data.split data.eval_split data.prompt_column data.max_prompt_length data.too_long
    rollout.max_completion_length
    reward.funcs reward.weights
    dqn.q_head dqn.beta dqn.reward_scale dqn.gamma dqn.backup dqn.double dqn.target dqn.prior dqn.support_top_k
    dqn.expectile dqn.truncated
    replay.capacity replay.warm_start replay.held_out_share replay.imitated_share
    train.seed
    """
)
_ABSENT = "not set"  # lora: null has no keys below it


def settings(recipe_text: str) -> dict[str, Any]:
    """A recipe's settings by dotted key, from its YAML."""
    return dict(_leaves("", yaml.safe_load(recipe_text)))


def _leaves(path: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for name, part in value.items() for leaf in _leaves(f"{path}.{name}".lstrip("."), part)]
    return [] if value is None and path == "lora" else [(path, value)]


def changes(old: dict[str, Any], new: dict[str, Any], allowed: Sequence[str] = ()) -> list[str]:
    """A line for each setting that differs, old -> new, for people to read before a run goes on.

    allowed: dotted keys, or sections, that may change although they should not. Raises UserError that names every
    change which is neither harmless nor allowed, and for an allowed key that does not exist.
    """
    _known(allowed)
    different = [key for key in {**old, **new} if old.get(key, _ABSENT) != new.get(key, _ABSENT)]
    curved = new.get("train.lr_scheduler_type", "constant") in ("linear", "cosine")
    lines, refused = [], []
    for key in different:
        line = f"{key}: {old.get(key, _ABSENT)} -> {new.get(key, _ABSENT)}"
        if key in HARMLESS and not (key == "train.max_steps" and curved):
            lines.append(line)
        elif key in HARMLESS | NOTED:
            lines.append(f"{line}; from here on the run is not the one that had this from the start")
        elif any(key == name or key.startswith(name + ".") for name in allowed):
            lines.append(f"{line}; allowed by you, although what was saved belongs to the old value")
        else:
            refused.append((key, line))
    if refused:
        flags = " ".join(f"--allow-change {key}" for key, _ in refused)
        raise UserError(
            "the run was begun with other settings than it is asked to go on with:\n"
            + "".join(f"  {line}\n" for _, line in refused)
            + f"put them back, start a new run in another train.output_dir, or insist with {flags}"
        )
    return lines


def _known(allowed: Sequence[str]) -> None:
    keys = HARMLESS | NOTED | REFUSED
    sections = {key.rsplit(".", 1)[0] for key in keys}
    for name in allowed:
        if name not in keys | sections:
            raise UserError(f"--allow-change {name}: no setting has this name{did_you_mean(name, keys | sections)}")
