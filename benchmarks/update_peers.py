"""What others do with the same tokens: steps that `benchmarks.update` measures ours against, in their usual form."""

from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llm_dqn.models import load_tokenizer
from llm_dqn.shipped import shipped_root
from llm_dqn.states import action_states
from llm_dqn.types import PrefixBatch

Step = Callable[[PrefixBatch], None]
Peer = Callable[[PreTrainedModel, LoraConfig], Step]
CHUNK = 128


def _step(modules: list[nn.Module], loss_of: Callable[[PrefixBatch], Tensor]) -> Step:
    trainable = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)

    def step(batch: PrefixBatch) -> None:
        loss_of(batch).backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _labels(batch: PrefixBatch) -> Tensor:
    """(B, L) token ids, -100 on prompts and padding."""
    tokens = batch.tokens
    places = torch.arange(tokens.input_ids.shape[1], device=tokens.input_ids.device)
    prompt = places < tokens.prompt_lengths.unsqueeze(1)
    return tokens.input_ids.masked_fill(prompt | (tokens.attention_mask == 0), -100)


def cross_entropy(model: PreTrainedModel, lora: LoraConfig) -> Step:
    """`model(labels=...)`, as fine-tuning scripts write it."""
    tuned = get_peft_model(model, lora)

    def loss(batch: PrefixBatch) -> Tensor:
        tokens = batch.tokens
        labels = _labels(batch)
        return tuned(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, labels=labels, use_cache=False
        ).loss

    return _step([tuned], loss)


def chunked_cross_entropy(model: PreTrainedModel, lora: LoraConfig) -> Step:
    """The same loss with logits of completion tokens only, a chunk at a time, computed again in backward."""
    tuned = get_peft_model(model, lora)

    def piece(states: Tensor, actions: Tensor) -> Tensor:
        return functional.cross_entropy(model.lm_head(states), actions, reduction="sum")

    def loss(batch: PrefixBatch) -> Tensor:
        tokens = batch.tokens
        hidden = model.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False)
        states, actions = action_states(hidden[0], tokens), tokens.actions[tokens.action_mask]
        pieces = zip(states.split(CHUNK), actions.split(CHUNK), strict=True)
        return sum(checkpoint(piece, *part, use_reentrant=False) for part in pieces) / len(actions)

    return _step([tuned], loss)


def naive_dqn(model: PreTrainedModel, lora: LoraConfig) -> Step:
    """Q-learning as in a textbook: all Q-values of all positions, online with gradient and target without.

    Mnih et al. 2015, eq. 2, the output layer being the Q-head. The target is the model with a second adapter.
    """
    tuned = get_peft_model(model, lora)
    tuned.add_adapter("target", lora)
    tuned.set_adapter("default")

    def loss(batch: PrefixBatch) -> Tensor:
        given: dict[str, Any] = {
            "input_ids": batch.tokens.input_ids,
            "attention_mask": batch.tokens.attention_mask,
            "use_cache": False,
        }
        with torch.no_grad():
            tuned.base_model.set_adapter("target", inference_mode=True)
            highest = tuned(**given).logits.max(-1).values.float()
            tuned.base_model.set_adapter("default")
        q_values = tuned(**given).logits[:, :-1]
        taken = q_values.gather(-1, given["input_ids"][:, 1:].unsqueeze(-1)).squeeze(-1).float()
        counts = _labels(batch)[:, 1:] != -100
        rewards, discounts = torch.zeros_like(taken), torch.zeros_like(taken)
        rewards[counts], discounts[counts] = batch.rewards[batch.action_mask], batch.discounts[batch.action_mask]
        error = taken - (rewards + discounts * highest[:, 1:])
        return error.square()[counts].mean()

    return _step([tuned], loss)


def grpo(model: PreTrainedModel, lora: LoraConfig) -> Step:
    """What `GRPOTrainer` of TRL computes for a batch, by its own code and with its defaults, no reference model.

    Shao et al. 2024, eq. 3, https://arxiv.org/abs/2402.03300. Whatever it spends on writing and on logs is left out.
    """
    from trl import GRPOConfig, GRPOTrainer

    on_cpu = model.device.type == "cpu"
    settings = {"use_cpu": on_cpu, "bf16": False, "gradient_checkpointing": False, "report_to": []}
    with TemporaryDirectory() as folder:  # it makes one at once
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
            args=GRPOConfig(output_dir=folder, num_generations=4, **settings),
            train_dataset=Dataset.from_list([{"prompt": "unused"}]),
            processing_class=load_tokenizer(str(shipped_root() / "data" / "tiny_lm")),
            peft_config=lora,
        )
    trainer.current_gradient_accumulation_steps = 1  # as within its own loop
    trainer.model.train()

    def loss(batch: PrefixBatch) -> Tensor:
        tokens, mask, length = batch.tokens, batch.action_mask, batch.tokens.actions.shape[1]
        rewards = batch.rewards.sum(1)
        given = {
            "prompt_ids": tokens.input_ids[:, :-length],  # prompts of equal length
            "prompt_mask": tokens.attention_mask[:, :-length],
            "completion_ids": tokens.actions,
            "completion_mask": mask.long(),
            "advantages": (rewards - rewards.mean()) / (rewards.std() + 1e-4),
            "num_items_in_batch": mask.sum(),
        }
        return trainer.compute_loss(trainer.model, given)

    return _step([trainer.model], loss)


def ilql(model: PreTrainedModel, lora: LoraConfig) -> Step:
    """ILQL as published: two Q-heads, two target Q-heads and the LM's logits, each a (B, T, V) tensor, and V.

    Snell et al. 2023, eq. 2 to 4, https://arxiv.org/abs/2206.11871: expectile 0.7, CQL 0.1, a term of the LM 1.0; heads
    are layers of width 2 H, as the authors' and trlx's are.
    """
    tuned = get_peft_model(model, lora)
    hidden_size, tokens_count = model.config.hidden_size, model.config.vocab_size

    def head(outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(hidden_size, 2 * hidden_size), nn.ReLU(), nn.Linear(2 * hidden_size, outputs))

    q_heads, value_head = nn.ModuleList([head(tokens_count), head(tokens_count)]), head(1)
    targets = nn.ModuleList([head(tokens_count), head(tokens_count)]).requires_grad_(False)

    def loss(batch: PrefixBatch) -> Tensor:
        tokens, mask = batch.tokens, batch.action_mask
        hidden = model.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False)[0]
        states = action_states(hidden, tokens).view(*mask.shape, hidden_size)  # episodes of equal length
        actions, logits = tokens.actions, model.lm_head(states)
        all_q = [q_head(states) for q_head in q_heads]
        with torch.no_grad():
            lagging = [target(states).gather(-1, actions.unsqueeze(-1)).squeeze(-1) for target in targets]
        values = value_head(states).squeeze(-1)
        following = functional.pad(values[:, 1:], (0, 1)).detach()
        aim = batch.rewards + batch.discounts * following
        error = torch.minimum(*lagging) - values
        total = (torch.where(error > 0, 0.7, 0.3) * error.square()).mean()
        flat = actions.flatten()
        for q_values in all_q:
            taken = q_values.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
            total = total + (taken - aim).square().mean()
            total = total + 0.1 * functional.cross_entropy(q_values.flatten(0, 1), flat)
        return total + functional.cross_entropy(logits.flatten(0, 1), flat)

    return _step([tuned, q_heads, value_head], loss)


PEERS: dict[str, Peer] = {
    "cross entropy": cross_entropy,
    "cross entropy in chunks": chunked_cross_entropy,
    "GRPO of TRL": grpo,
    "naive DQN": naive_dqn,
    "ILQL": ilql,
}
