"""From settings to parts: loads and checks everything a run needs before any long work starts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from llm_dqn import data, losses, models, replay, schedules, targets
from llm_dqn.adapters import LoraConfig, lora_facts
from llm_dqn.dyna import Dyna
from llm_dqn.early_stopping import EarlyStopping, HeldOut
from llm_dqn.errors import UserError
from llm_dqn.heads import HeadSettings
from llm_dqn.launch import accelerator_for
from llm_dqn.logged import IMITATED_OF_LOG, fill_from_log, kept_apart, least_imitated, mean_reward
from llm_dqn.network import Backup, QNetwork
from llm_dqn.objective import LossRule, Objective
from llm_dqn.recipe import FLAT_SECTIONS, DQNConfig, Recipe, dump_recipe, with_resolved_paths
from llm_dqn.reduction import share_from_first
from llm_dqn.replay import PrefixReplay, SamplingRule
from llm_dqn.reward_kinds import IMITATED
from llm_dqn.rewards import Rewards, load_reward
from llm_dqn.rollout import Writer
from llm_dqn.sharding import is_share, shard_over
from llm_dqn.sharpening import Sharpening
from llm_dqn.types import PrefixBatch, Prompt, QOutput
from llm_dqn.vllm_launch import LocalServer, Served
from llm_dqn.vllm_server import VLLMServer

ReturnsRule = Callable[[PrefixBatch, QOutput], Tensor]  # (batch, target network's output) -> td_target (B, T)

ERRORS = {"mse": losses.squared_error, "huber": losses.huber_error}
# LoRA's factors start at zero and bear rates that wreck whole weights.
LEARNING_RATE, LOGGED_LEARNING_RATE, FULL_LEARNING_RATE = 2.5e-4, 5e-4, 1e-4
FROM_PYTHON = "given from Python"  # the data of a run whose prompts and rewards are objects of a script
HOLD_OUT = 5  # name of a random stream


@dataclass(frozen=True)
class Inputs:
    """What a run is about, loaded: the model, its prompts and its rewards."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train_prompts: list[Prompt]
    eval_prompts: list[Prompt]
    rewards: Rewards
    lora: LoraConfig | None
    logged: Sequence[data.LoggedRow] = ()


@dataclass(frozen=True)
class Parts:
    """The boxes of the textbook diagram, ready to be wired by the loop."""

    accelerator: Accelerator
    network: QNetwork
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    trainable: list[nn.Parameter]
    writer: Writer
    rewards: Rewards
    replay: PrefixReplay
    early_stopping: EarlyStopping | None  # of a run that learns from a log alone
    held_out: HeldOut | None
    dyna: Dyna | None
    sharpening: Sharpening | None  # of such a run where answers are right or wrong, and held-out successes watch
    sampling: SamplingRule
    stream: data.PromptStream
    eval_prompts: list[Prompt]
    lora: LoraConfig | None
    returns: ReturnsRule
    objective: Objective
    epsilon: schedules.Schedule
    notes: Sequence[str]  # what follows from the settings and is worth telling

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a share of the weights."""
        return any(is_share(parameter) for parameter in self.trainable)

    def totals(self, *values: Tensor | float) -> Tensor:
        """(n,) sums of some numbers over all processes, in one message."""
        device = self.accelerator.device
        numbers = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values])
        return self.accelerator.reduce(numbers, reduction="sum")


def settings_of(recipe: Recipe) -> DQNConfig:
    """The recipe's leaves, flat."""
    return DQNConfig(**{leaf: value for name in FLAT_SECTIONS for leaf, value in getattr(recipe, name)})


def base_model_of(recipe: Recipe) -> PreTrainedModel:
    """The pretrained model that a recipe names."""
    facts = recipe.model
    path, revision = facts.model_name_or_path, facts.model_revision
    how = (facts.dtype, facts.attn_implementation, facts.trust_remote_code, facts.use_safetensors)
    return models.load_causal_lm(path, revision, *how)


def rewards_of(recipe: Recipe) -> Rewards:
    """The reward functions that a recipe names."""
    folders = [Path.cwd(), *([recipe.folder] if recipe.folder else [])]
    facts = recipe.reward
    functions = [load_reward(spec, folders) for spec in facts.funcs]
    return Rewards(functions, facts.weights, facts.on_error, facts.timeout, facts.cache)


def logged_rows(args: DQNConfig, tokenizer: PreTrainedTokenizerBase, context: int | None) -> Sequence[data.LoggedRow]:
    """Completions scored elsewhere that fill the replay before the first step; `context`: tokens the model reads."""
    return data.load_logged(args.warm_start, tokenizer, context=context) if args.warm_start else ()


def with_learning_rate(args: DQNConfig, lora: LoraConfig | None) -> DQNConfig:
    """The same settings with the learning rate that follows from what is tuned, where none was given."""
    if args.learning_rate is not None:
        return args
    of_lora = LOGGED_LEARNING_RATE if args.log_alone else LEARNING_RATE
    return args.model_copy(update={"learning_rate": FULL_LEARNING_RATE if lora is None else of_lora})


def assemble(args: DQNConfig, inputs: Inputs) -> Parts:
    """Wires the parts; after this nothing is missing that training needs. `args` has its learning rate."""
    accelerator = accelerator_for()
    model = inputs.model
    torch.manual_seed(args.seed)  # LoRA and heads start alike on every process
    network = network_for(args, inputs, accelerator.device, args.target)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if accelerator.num_processes > 1:
        share_from_first(network.checkpoint_state().values())
    if args.sharding == "fsdp2":
        shard_over(network, accelerator.device, accelerator.num_processes)
    elif args.hidden_cache_gb > 0:
        network.keep_hidden_states(int(args.hidden_cache_gb * 1e9))
    optimizer = optimizer_for(network, args)
    optimizer = accelerator.prepare(optimizer)  # the network stays as it is: `reduction` sums its gradients
    writer = writer_for(args, inputs, network)
    rank, world = accelerator.process_index, accelerator.num_processes
    scratch = Path(args.output_dir, f".replay-{rank:05d}.segment") if args.storage == "disk" else None
    vocabulary = models.vocabulary_hash(inputs.tokenizer)
    memory = PrefixReplay(args.capacity, args.gamma, args.truncated, vocabulary, scratch=scratch)
    memory.imitated_share = args.imitated_share or IMITATED
    logged, kept = inputs.logged, inputs.logged[:0]
    if logged and args.log_alone:  # new completions need no watching, and are better and better
        least = memory.least_logged = least_imitated(logged, args.imitated_share or IMITATED_OF_LOG)
        logged, kept = kept_apart(logged, args.held_out_share, stream_seed(args.seed, HOLD_OUT), least)
    fill_from_log(memory, writer, logged[rank::world])
    held_out = sharpening = None
    if kept:
        held_out = HeldOut(network, mean_reward(inputs.logged), partial(accelerator.reduce, reduction="sum"))
        fill_from_log(held_out.episodes, writer, kept[rank::world])
        if args.sharpened and len(rewards := {row.reward for row in inputs.logged}) == 2:
            sharpening = Sharpening(args.sharpened, max(rewards))
    return Parts(
        accelerator=accelerator,
        network=network,
        optimizer=optimizer,
        scheduler=get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, args.max_steps),
        trainable=[parameter for parameter in network.parameters() if parameter.requires_grad],
        writer=writer,
        rewards=inputs.rewards,
        replay=memory,
        early_stopping=EarlyStopping(network) if args.log_alone else None,
        held_out=held_out,
        dyna=Dyna(network, args.imagined) if args.imagined else None,
        sharpening=sharpening,
        sampling=sampling_rule(args),
        stream=data.PromptStream(inputs.train_prompts, args.seed, args.num_generations, rank, world),
        eval_prompts=inputs.eval_prompts,
        lora=inputs.lora,
        returns=returns_rule(args),
        objective=objective_of(args),
        epsilon=schedules.linear(args.epsilon.start, args.epsilon.end, args.epsilon.steps),
        notes=notes_of(args, network, inputs.logged, kept, memory.least_logged),
    )


def notes_of(
    args: DQNConfig,
    network: QNetwork,
    logged: Sequence[data.LoggedRow],
    kept: Sequence[data.LoggedRow],
    least: float | None,
) -> list[str]:
    """What the run says before it starts. kept: logged completions that say when to stop. least: reward that one must
    have to be imitated, in a run on a log alone.
    """
    notes = []
    if network.hidden_cache is not None:
        room = f"{args.hidden_cache_gb:g} GB (train.hidden_cache_gb)"
        notes.append(f"nothing in the trunk is trained: hidden states are kept, in up to {room}")
    if least is not None:
        best = sum(row.reward >= least for row in logged)
        notes.append(
            f"{best:,} of {len(logged):,} logged completions, with rewards of at least {least:g}, are imitated "
            "(replay.imitated_share); the others teach values"
        )
    if args.log_alone and args.held_out_share > 0:
        notes.append(f"{len(kept)} of these are not learned from and say when to stop (replay.held_out_share)")
    return notes


def head_settings(args: DQNConfig) -> HeadSettings:
    """The heads of a run's network."""
    return HeadSettings(args.q_head, price(args), args.prior == "uniform", with_value=args.expectile is not None)


def network_for(args: DQNConfig, inputs: Inputs, device: torch.device, target: Literal["adapter", "head"]) -> QNetwork:
    """The Q-network of a run, untrained. target: what of it lags."""
    model = inputs.model.to(device)
    return QNetwork(
        model,
        models.num_valid_tokens(model, inputs.tokenizer),
        head_settings(args),
        lora=inputs.lora,
        target=target,
        backup=backup_rule(args),
        bf16=args.bf16,
    ).to(device)


def writer_for(args: DQNConfig, inputs: Inputs, network: QNetwork) -> Writer:
    """What writes a run's completions, by the engine that was asked for. Raises UserError where that cannot be had."""
    server = None
    if args.engine == "vllm":
        if not network.has_adapter:
            raise UserError(
                "rollout.engine: vllm needs an adapter to hand to the server; set lora, or engine: generate"
            )
        server = VLLMServer(args.vllm_url or local_server(args, inputs, network).start, args.vllm_folder)
    stop_ids = frozenset(models.stop_token_ids(inputs.model, inputs.tokenizer))
    length = args.max_completion_length
    return Writer(network, inputs.tokenizer, stop_ids, length, engine=args.engine, server=server)


def local_server(args: DQNConfig, inputs: Inputs, network: QNetwork) -> LocalServer:
    """A vLLM server of the run's own base model, not started yet. Raises UserError where none can be."""
    assert inputs.lora is not None
    ranks = (inputs.lora.r, *(inputs.lora.rank_pattern or {}).values())
    longest = max(len(prompt.ids) for prompt in (*inputs.train_prompts, *inputs.eval_prompts))
    dtype = str(inputs.model.dtype).removeprefix("torch.")
    served = Served(
        model=network.base_name,
        rank=max(ranks),
        length=longest + args.max_completion_length,
        memory=args.vllm_gpu_memory_utilization,
        dtype="auto" if dtype == "float32" else dtype,  # vLLM's LoRA kernels know only halves
        revision=getattr(inputs.model.config, "_commit_hash", None),
        remote_code=any(_from_remote_code(part) for part in (inputs.model, inputs.tokenizer)),
    )
    gpu = (network.device.index or 0) if network.device.type == "cuda" else None
    return LocalServer(served, gpu, Path(args.output_dir, "vllm.log"))


def _from_remote_code(part: Any) -> bool:
    return type(part).__module__.startswith("transformers_modules")


def optimizer_for(network: QNetwork, args: DQNConfig) -> torch.optim.Optimizer:
    """AdamW; the heads start from nothing and learn at their own, higher rate."""
    heads = [parameter for parameter in network.heads.parameters() if parameter.requires_grad]
    policy = [parameter for parameter in network.model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": policy, "lr": args.learning_rate},
        {"params": heads, "lr": args.value_learning_rate},
    ]
    # Fused, no copy of a linear head's moments is made: half a gigabyte each at a vocabulary of 150,000.
    fused = args.sharding == "none"  # shares and whole weights in one group go only one by one
    return torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=fused, foreach=False if not fused else None)


def backup_rule(args: DQNConfig) -> Backup | Literal["soft"] | None:
    """How Q-values make a state's value; None where the value head says it."""
    if args.expectile is not None or (args.q_head == "lm" and args.backup == "soft"):
        return None
    if args.backup == "soft":
        return "soft"
    top_k = args.support_top_k
    if args.double:
        return lambda q, prior, online: targets.double_value(q, online(), targets.support_mask(prior, top_k))
    return lambda q, prior, _: targets.hard_value(q, targets.support_mask(prior, top_k))


def price(args: DQNConfig) -> float:
    """`dqn.beta`, or where none is given what the length of completions asks for."""
    return args.beta or targets.beta_for(args.max_completion_length)


def return_lambda(args: DQNConfig) -> float:
    """`dqn.lam`, or where none is given what the length of completions asks for."""
    return targets.lam_for(args.max_completion_length) if args.lam is None else args.lam


def returns_rule(args: DQNConfig) -> ReturnsRule:
    """How far a target looks ahead before it trusts the target network."""
    lam = return_lambda(args)

    def rule(batch: PrefixBatch, q: QOutput) -> Tensor:
        advantages = q.advantages if args.corrected else torch.zeros_like(q.taken)
        facts = (batch.rewards, batch.discounts, q.next_values, advantages, batch.action_mask)
        if args.n_step is not None:
            return targets.n_step_return(*facts, args.n_step)
        return targets.lambda_return(*facts, lam)

    return rule


def loss_rule(args: DQNConfig) -> LossRule:
    """How an error of Q is counted; the dueling head needs its two gradients kept apart."""
    error_fn, cap, beta = ERRORS[args.loss], args.importance_sampling_cap, price(args)

    def dueling(q: QOutput, target: Tensor, batch: PrefixBatch, count: Tensor) -> Tensor:
        weights = None if cap is None else losses.truncated_ratios(batch.behaviour_logprobs, q.logprobs, cap)
        facts = (q.values, q.advantages, target, batch.action_mask, count, beta, error_fn, weights)
        return losses.dueling_td_loss(*facts)

    if args.q_head == "lm":
        return dueling
    return lambda q, target, batch, count: losses.td_loss(q.taken, target, batch.action_mask, count, error_fn)


def objective_of(args: DQNConfig) -> Objective:
    """What is learned: the TD error and the terms beside it."""
    return Objective(loss_rule(args), args.advantage_weight, args.expectile, args.cql_weight)


def sampling_rule(args: DQNConfig) -> SamplingRule:
    """Which stored episodes are learned from."""
    if args.prioritized:
        return replay.prioritized()
    if args.success_share == 0:
        return replay.uniform()
    if args.success_share is None and not args.log_alone:
        return replay.by_rewards(args.success_odds, args.success_half_life)
    share = replay.SUCCESS_SHARE if args.success_share is None else args.success_share
    return replay.success_biased(share, args.success_odds, args.success_half_life)


def stream_seed(seed: int, *names: int) -> int:
    """A seed for one purpose, step and process. All randomness is drawn from such, so a resumed run draws the same."""
    return int(np.random.SeedSequence([seed, *names]).generate_state(1)[0])


def recipe_text(args: DQNConfig, parts: Parts, recipe: Recipe | None) -> str:
    """The resolved recipe of a run, as YAML that `llm-dqn` reads again; from Python it is put together from `args`."""
    if recipe is not None:
        train = recipe.train.model_copy(update={"learning_rate": args.learning_rate})
        resolved = with_resolved_paths(recipe)
        # what a branch of the Hub holds may be something else tomorrow
        commit = getattr(parts.network.model.config, "_commit_hash", None) or recipe.model.model_revision
        model = resolved.model.model_copy(update={"model_revision": commit})
        return dump_recipe(resolved.model_copy(update={"train": train, "model": model}))
    sections: dict[str, dict[str, Any]] = {
        name: {leaf: getattr(args, leaf) for leaf in section.model_fields} for name, section in FLAT_SECTIONS.items()
    }
    sections["reward"]["funcs"] = list(parts.rewards.names)
    lora = lora_facts(parts.lora) if parts.lora else None
    return dump_recipe(
        Recipe.model_validate(
            {
                "model": {"model_name_or_path": parts.network.base_name},
                "lora": lora,
                "data": {"train": FROM_PYTHON},
                **sections,
            }
        )
    )
