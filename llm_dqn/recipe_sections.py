"""The sections of a recipe: every setting with its default, its unit and its limits. The single home of defaults."""

import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool


def _path_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


# Strict: true is no number, 3.0 is no whole number, "3" is neither. A whole number where a number is meant is fine.
Int = Annotated[int, Field(strict=True)]
Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Text = Annotated[str, BeforeValidator(_path_text), Field(min_length=1)]
Share = Annotated[Float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the recipe: unknown keys are errors, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSection(Section):
    """The language model that is fine-tuned."""

    model_name_or_path: Text = Field(description="Folder of a causal language model, or its Hub id.")
    model_revision: Text | None = Field(default=None, description="Branch, tag or commit on the Hub; null = newest.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Precision of the frozen base weights; auto = as stored. Adapters and Q are always float32.",
    )
    attn_implementation: Text | None = Field(
        default=None, description="eager, sdpa, flash_attention_2 ...; null lets transformers choose."
    )
    trust_remote_code: StrictBool = Field(
        default=False, description="Run Python code that comes with the model. Only for repositories you have read."
    )
    use_safetensors: StrictBool = Field(
        default=True, description="false also opens pickled weights (.bin). Only from people you trust."
    )


class LoraSection(Section):
    """The adapter that is trained; null instead of the section trains every weight."""

    r: Annotated[Int, Field(ge=1)] = Field(default=16, description="Rank: higher learns more and costs more memory.")
    lora_alpha: Annotated[Float, Field(gt=0)] = Field(
        default=32, description="Scale; the update is multiplied by alpha / r."
    )
    lora_dropout: Annotated[Float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Dropout in the adapter while learning; above 0 the policy that wrote differs from the learner.",
    )
    target_modules: Text | list[Text] = Field(
        default="all-linear",
        description="all-linear, or names of modules that get an adapter; [] = none: a linear Q-head alone is tuned.",
    )


class DataSection(Section):
    """Prompts: what the model continues."""

    train: Text = Field(description="JSONL, CSV or Parquet file, or Hub id, with one prompt a row.")
    eval: Text | None = Field(
        default=None, description="Held-out prompts; null = eval_split of train, or no evaluation."
    )
    split: Text = Field(default="train", description="Split of `train`; a single file has only the split train.")
    eval_split: Text | None = Field(
        default=None, description="Split of `eval` (of `train` when eval is null); null = the same name as split."
    )
    test: Text | None = Field(
        default=None,
        description="Prompts that `evaluate --split test` measures on; null = test_split of train, or none.",
    )
    test_split: Text | None = Field(
        default=None, description="Split of `test` (of `train` when test is null); null = the same name as split."
    )
    prompt_column: Text = Field(
        default="prompt", description="Column with the prompt: text or a list of chat messages."
    )
    max_prompt_length: Annotated[Int, Field(ge=1)] = Field(
        default=512, description="Longest prompt allowed, in tokens."
    )
    too_long: Literal["error", "drop", "truncate", "keep_start"] = Field(
        default="error", description="What happens to longer prompts; truncate keeps their end, keep_start the start."
    )


class EpsilonSection(Section):
    """Share of completions (explore: prior) or tokens (explore: uniform) that exploration writes; falls in a line."""

    start: Share = Field(default=1.0, description="Share at step 0.")
    end: Share = Field(default=0.05, description="Share from `steps` on; at most start.")
    # Over by the trust region's first look: a collection that it asks for is to be by the policy of then.
    steps: Annotated[Int, Field(ge=0)] = Field(
        default=4, description="Learner steps that the fall takes; 0 = end at once."
    )


class RolloutSection(Section):
    """How completions are written."""

    engine: Literal["generate", "continuous", "vllm"] = Field(
        default="generate",
        description="What writes: transformers' generate, its continuous batching, or a vLLM server.",
    )
    vllm_url: Text | None = Field(
        default=None,
        description="Address of a vLLM server, as http://127.0.0.1:8000; null = the run starts one on its device.",
    )
    vllm_gpu_memory_utilization: Annotated[Float, Field(gt=0, le=1)] = Field(
        default=0.3, description="Share of the GPU's memory that a vLLM server which the run starts may take."
    )
    vllm_folder: Text | None = Field(
        default=None,
        description="Folder in which the vLLM server finds adapters; null = a temporary one, on the same machine.",
    )
    num_generations: Annotated[Int, Field(ge=1)] = Field(
        default=1,
        description="Completions a prompt. More lower the variety of prompts for the same number of reward calls.",
    )
    prompts_per_collect: Annotated[Int, Field(ge=1)] | None = Field(
        default=None,
        description="Prompts of one collection; null = 64 first, where a judge grades or collectors write, else 32.",
    )
    max_completion_length: Annotated[Int, Field(ge=1)] = Field(
        default=64, description="Length cap of a completion, in tokens."
    )
    temperature: Annotated[Float, Field(ge=0)] | None = Field(
        default=None,
        description="Divides the logits; 0 = greedy, null = 1, and after the first collection 0.3 of two rewards, "
        "where that did not fail, and 0.6 of more that repeat, at a prompt every other time.",
    )
    top_k: Annotated[Int, Field(ge=0)] = Field(default=0, description="Sample among the k most likely tokens; 0 = all.")
    top_p: Annotated[Float, Field(gt=0, le=1)] = Field(
        default=1.0, description="Sample in the smallest set of this probability; 1 = all."
    )
    min_p: Share | None = Field(
        default=None, description="Leave out tokens below this share of the likeliest one's probability; null = none."
    )
    epsilon: EpsilonSection = Field(
        default_factory=EpsilonSection, description="Schedule of the share that exploration writes: start, end, steps."
    )
    explore: Literal["prior", "uniform"] = Field(
        default="prior",
        description="prior: that share of completions is the base model's; uniform: of tokens, any token (textbook).",
    )
    overlap: Annotated[Int, Field(ge=0)] = Field(
        default=0,
        description="Collector processes that write while the run learns, each a collection behind; 0 = none.",
    )
    collectors: Text | None = Field(
        default=None,
        description="Folder that `llm-dqn collect` fills and the learner empties; null = the learner writes itself.",
    )
    publish_steps: Annotated[Int, Field(ge=1)] = Field(
        default=16, description="With collectors: learner steps between two looks that they get at the policy."
    )
    collector_timeout: Annotated[Float, Field(gt=0)] = Field(
        default=600.0,
        description="With collectors: seconds without a segment after which the run ends, saved.",
    )


class RewardSection(Section):
    """What judges whole completions."""

    funcs: list[Text] = Field(
        min_length=1,
        description="file.py:function or package.module:function (code that is run), or a reward model's folder or id.",
    )
    weights: list[Float] | None = Field(
        default=None, description="Factor of each reward function in the sum; null = 1 each."
    )
    on_error: Literal["fail", "skip"] | Float = Field(
        "fail",
        description="When a reward function raises: fail stops the run, skip drops the rows, a number stands in.",
    )
    timeout: Annotated[Float, Field(gt=0)] | None = Field(
        default=None, description="Seconds a call of a reward function may take; null = no limit."
    )
    cache: StrictBool = Field(
        default=True,
        description="Ask a function that proves deterministic once a request. Repeats still count as scored.",
    )
    called_by: Literal["all", "main"] = Field(
        default="all",
        description="Which processes call the rewards: each for its share, or the main one for all (rate limits).",
    )


class DQNSection(Section):
    """The learning rule."""

    q_head: Literal["lm", "linear"] = Field(
        default="lm",
        description="lm: Q = V + beta * log-ratio of the tuned to the base model; linear: a new layer (textbook).",
    )
    beta: Annotated[Float, Field(gt=0)] | None = Field(
        default=None, description="Price of leaving the base, reward_scales a nat; low = drift; null = by length."
    )
    reward_scale: Annotated[Float, Field(gt=0)] | None = Field(
        default=None, description="Unit in which the lm head learns from rewards; null = the spread of the first ones."
    )
    gamma: Annotated[Float, Field(gt=0, le=1)] = Field(
        default=1.0, description="Discount a token; below 1 pays for brevity (0.99^256 = 0.08)."
    )
    backup: Literal["soft", "max"] = Field(
        default="soft", description="Value of a state: soft maximum, or maximum (textbook)."
    )
    double: StrictBool = Field(default=False, description="The online network picks, the target values; backup max.")
    n_step: Annotated[Int, Field(ge=1)] | None = Field(
        default=None, description="Tokens before the target bootstraps; 1 = textbook, null = lambda-return with lam."
    )
    lam: Share | None = Field(
        default=None, description="Mixture of n-step returns while n_step is null; 1 = to the end, null = by length."
    )
    corrected: StrictBool = Field(
        default=True,
        description="Subtract beta * log-ratio inside multi-step returns, which makes old episodes unbiased.",
    )
    importance_sampling_cap: Annotated[Float, Field(gt=0)] | None = Field(
        default=1.0,
        description="Most that an old error of Q weighs for the policy, by pi now over pi then; null = all weigh 1.",
    )
    loss: Literal["mse", "huber"] = Field(
        default="mse", description="Of the TD error; huber is biased for yes/no rewards."
    )
    target: Literal["adapter", "head"] = Field(
        default="adapter",
        description="adapter: a lagging copy of adapter and head; head: of the head only, the trunk drifts.",
    )
    target_sync_steps: Annotated[Int, Field(ge=1)] = Field(
        default=64, description="Learner steps between target updates."
    )
    target_tau: Annotated[Float, Field(gt=0, le=1)] = Field(
        default=1.0, description="Share of the online network in a target update; 1 = copy."
    )
    prior: Literal["lm", "uniform"] = Field(
        default="lm", description="Policy that Q is measured against; uniform (textbook) forgets the language model."
    )
    support_top_k: Annotated[Int, Field(ge=0)] = Field(
        default=0, description="Only the base model's k likeliest tokens are actions; 0 = the whole vocabulary."
    )
    advantage_weight: Annotated[Float, Field(ge=0)] = Field(
        default=100.0,
        description="Weight of the term that makes tokens of positive advantage likelier; 0 = TD loss alone.",
    )
    negative_weight: Share | None = Field(
        default=None,
        description="Share of negative advantages in it; null = 1 where texts are graded, else 0.",
    )
    negative_half_life: Annotated[Float, Field(gt=0)] | None = Field(
        default=None, description="Learner steps after which that share is half as large; null = it stays."
    )
    expectile: Annotated[Float, Field(ge=0.5, lt=1)] | None = Field(
        default=None,
        description="Fit V as this expectile of Q, for logged data (ILQL); null = off. With q_head linear.",
    )
    cql_weight: Annotated[Float, Field(ge=0)] = Field(
        default=0.0, description="Weight of the penalty on Q of tokens nobody wrote, for logged data."
    )
    truncated: Literal["terminal", "bootstrap"] = Field(
        default="terminal", description="A completion cut at the length cap ends there, or is valued as if it went on."
    )


class ReplaySection(Section):
    """What is remembered and how often it is learned from."""

    capacity: Annotated[Int, Field(ge=1)] = Field(
        default=4096, description="Episodes kept a process; the oldest go first."
    )
    storage: Literal["memory", "disk"] = Field(
        default="memory", description="Where their tokens lie; disk: in the run folder, mapped; for millions of them."
    )
    learning_starts: Annotated[Int, Field(ge=1)] = Field(
        default=64, description="Episodes a process before the first update."
    )
    updates_per_collect: Annotated[Int, Field(ge=1)] = Field(
        default=32, description="Learner steps between collections; more = fewer reward calls a step, older data."
    )
    imagined: Annotated[Int, Field(ge=0)] = Field(
        default=3,
        description="Completions with a predicted reward for each scored one, where rewards can be predicted, and "
        "twice the learner steps, of grades as many more; with logged data alone, all that are written; 0 = none.",
    )
    sharpened: Annotated[Int, Field(ge=0)] = Field(
        default=1,
        description="With logged data alone: own completions, never scored, beside each logged one, while that helps.",
    )
    target_kl: Annotated[Float, Field(gt=0)] | None = Field(
        default=0.2,
        description="Nats a token that the policy may move from the one that wrote last before it collects again.",
    )
    max_age: Annotated[Int, Field(ge=0)] | None = Field(
        default=None,
        description="With collectors: episodes by a policy more learner steps old are refused; null = all are taken.",
    )
    prioritized: StrictBool = Field(
        default=False, description="Sample by TD error, whatever the rewards; excludes success_share."
    )
    success_share: Share | None = Field(
        default=None,
        description="Share of a batch that scored above the buffer's mean; 0 = uniform, null = 0.7, or newer ones "
        "where rewards are grades.",
    )
    success_odds: Annotated[Float, Field(ge=1)] = Field(
        default=8.0,
        description="How many times likelier than another such an episode may be drawn: few lucky ones count less.",
    )
    success_half_life: Annotated[Float, Field(gt=0)] | None = Field(
        default=64.0,
        description="Learner steps after which such an episode (of grades: any) is drawn half as often; null = never.",
    )
    warm_start: Text | None = Field(
        default=None, description="JSONL of prompt, completion, reward that fills the buffer before step 0."
    )
    held_out_share: Annotated[Float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="With logged data alone: share of its prompts kept apart, which say when to stop."
    )
    imitated_share: Annotated[Float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Best share that is imitated; null = 0.1 of a log alone, else 0.25 where counted."
    )


class TrainSection(Section):
    """The run: how long, how fast, what is written where."""

    output_dir: Text = Field(description="Folder of the run: recipe, metrics, adapter, checkpoints.")
    learning_rate: Annotated[Float, Field(ge=0)] | None = Field(
        default=None, description="Peak rate of the policy; null = 2.5e-4 for LoRA (log alone: 5e-4), else 1e-4."
    )
    value_learning_rate: Annotated[Float, Field(ge=0)] = Field(
        default=1.0e-3, description="Peak rate of the Q and V heads."
    )
    weight_decay: Annotated[Float, Field(ge=0)] = Field(
        default=0.0, description="AdamW's decay of the trained weights."
    )
    max_grad_norm: Annotated[Float, Field(gt=0)] = Field(
        default=1.0, description="Longer gradients are scaled down to this."
    )
    max_nonfinite_steps: Annotated[Int, Field(ge=1)] = Field(
        default=5,
        description="Steps in a row that may be left out because loss or gradient was not finite; then the run stops.",
    )
    warmup_steps: Annotated[Int, Field(ge=0)] = Field(default=0, description="Learner steps from rate 0 to the peak.")
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = Field(
        default="constant", description="Course of both rates over max_steps."
    )
    per_device_train_batch_size: Annotated[Int, Field(ge=1)] = Field(
        default=16, description="Episodes in one forward and backward pass of a process."
    )
    gradient_accumulation_steps: Annotated[Int, Field(ge=1)] = Field(
        default=1, description="Passes in one learner step."
    )
    max_steps: Annotated[Int, Field(ge=1)] = Field(default=500, description="Learner steps in all.")
    max_scored_completions: Annotated[Int, Field(ge=0)] | None = Field(
        default=None,
        description="Budget of completions given to the rewards while training; 0 = logged data only, null = no limit.",
    )
    seed: Annotated[Int, Field(ge=0)] = Field(default=0, description="Seed of everything random.")
    bf16: StrictBool = Field(default=False, description="bfloat16 autocast in the trunk; Q and losses stay float32.")
    sharding: Literal["none", "fsdp2"] = Field(
        default="none", description="fsdp2: while learning, each process holds a share of every layer. Needs LoRA."
    )
    gradient_checkpointing: StrictBool = Field(default=False, description="Recompute activations: less memory, slower.")
    hidden_cache_gb: Annotated[Float, Field(ge=0)] = Field(
        default=1.0,
        description="Main memory for hidden states of episodes where the output layer alone is tuned, in GB; 0 = none.",
    )
    logging_steps: Annotated[Int, Field(ge=1)] = Field(
        default=10, description="Learner steps between lines of metrics."
    )
    eval_steps: Annotated[Int, Field(ge=0)] = Field(
        default=50, description="Learner steps between evaluations; 0 = only after training."
    )
    eval_prompts: Annotated[Int, Field(ge=1)] = Field(
        default=64, description="Held-out prompts used at most in an evaluation while training."
    )
    final_eval_prompts: Annotated[Int, Field(ge=1)] = Field(
        default=256, description="Held-out prompts used at most in the evaluation after training."
    )
    final_beta_scales: list[Float] = Field(
        default_factory=list,
        description="Strengths besides 0 (base) and 1 (tuned) measured after training, on 64 held-out prompts at most.",
    )
    save_steps: Annotated[Int, Field(ge=0)] = Field(
        default=100, description="Learner steps between checkpoints; 0 = only at the end."
    )
    save_total_limit: Annotated[Int, Field(ge=1)] | None = Field(
        default=3, description="Checkpoints kept, the best evaluated one among them whatever its age; null = all."
    )
    report_to: Text | list[Text] = Field(
        default="none", description="none, or trackers besides metrics.jsonl: tensorboard, wandb, trackio ..."
    )
    run_name: Text | None = Field(default=None, description="Name shown by trackers; null = name of output_dir.")
