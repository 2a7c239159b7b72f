"""Hidden states that are kept: Q-values and gradients, the bound, and nothing that a resumed run could notice."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from llm_dqn.errors import UserError
from llm_dqn.hidden_cache import HiddenCache
from llm_dqn.recipe import load_recipe
from llm_dqn.trainer import DQNTrainer
from tests.networks import lora, network, shake
from tests.test_network import EPISODES, batch_of
from tests.torture import CLOCKS

HEADS = {
    "lm": {"lora": lora(target_modules=["lm_head"])},
    "linear": {"q_head": "linear", "lora": lora(target_modules=[]), "backup": "soft"},
}


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", HEADS)
def test_values_and_gradients_are_those_of_the_computation(tiny_llama_path, kind, bf16):
    net = network(tiny_llama_path, bf16=bf16, **HEADS[kind])
    shake(net)
    batch = batch_of(net)
    net.model.gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    for kept in (False, True, True):  # the last one from memory
        assert (net.hidden_cache is not None) == kept or net.keep_hidden_states(10**6)
        net.zero_grad()
        q, target = net(batch), net.target(batch)
        (q.taken.square().sum() + q.logprobs.sum()).backward()
        gradients = [p.grad.clone() for p in net.parameters() if p.requires_grad and p.grad is not None]
        figures = [q.taken, q.logprobs, target.taken, target.values, target.next_values, net.kl(batch.tokens)]
        found.append([value.detach() for value in (*figures, *gradients)])
    assert len(net.hidden_cache) == len(EPISODES) and net.hidden_cache.hit_share() > 0.8
    tolerance = {"atol": 5e-2, "rtol": 5e-2} if bf16 else {"atol": 1e-5, "rtol": 1e-5}
    for computed, first, again in zip(*found, strict=True):
        assert torch.allclose(computed, first, **tolerance)
        assert torch.equal(first, again)


def test_what_comes_out_does_not_depend_on_the_batch(tiny_llama_path):
    """Bit for bit, or a resumed run would differ from one that had met the episodes in another order."""
    net = network(tiny_llama_path, **HEADS["lm"])
    net.keep_hidden_states(10**6)
    together = net._hidden(batch_of(net).tokens, "online")
    for row, (prompt, completion) in enumerate(EPISODES):
        net.keep_hidden_states(10**6)
        alone = net._hidden(batch_of(net, episodes=[EPISODES[row]]).tokens, "target")[0]
        states = slice(len(prompt) - 1, len(prompt) + len(completion))
        assert torch.equal(together[row, states], alone[states])
        assert together[row, states.stop :].abs().sum() == 0


def test_the_bound_is_kept_and_the_oldest_goes_first(tiny_llama_path):
    asked = []

    def compute(ids):
        asked.append(ids.tolist()[0])
        return torch.ones(1, ids.shape[1], 4)

    net = network(tiny_llama_path)
    first, second, third = (batch_of(net, episodes=[pair]).tokens for pair in EPISODES)
    sizes = [8 * len(p + c) + 8 + 16 * (len(c) + 1) for p, c in EPISODES]  # ids, the prompt's length, states
    cache = HiddenCache(limit=sizes[0] + sizes[2])
    for tokens in (first, second, first, third, first, second):
        cache.hidden(tokens, compute)
        assert cache.held <= cache.limit
    assert [ids[0] for ids in asked] == [5, 11, 13, 11]  # the third took the place of the second
    assert cache.hit_share() == pytest.approx(2 / 6) and cache.hit_share() == 0
    small = HiddenCache(limit=sizes[1] - 1)
    assert small.hidden(second, compute).sum() == 4 * 3 and len(small) == small.held == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora": None},
        {"lora": lora(target_modules=["lm_head", "layers.1.mlp.down_proj"])},
        {"lora": lora(target_modules=["lm_head"], modules_to_save=["norm"])},
        {"lora": lora(target_modules=["lm_head"], trainable_token_indices=[3])},
        {"q_head": "linear"},
    ],
    ids=["all-linear", "all weights", "one layer", "norm", "tokens", "linear head"],
)
def test_whatever_is_tuned_in_the_trunk_switches_it_off(tiny_llama_path, options):
    net = network(tiny_llama_path, **options)
    assert not net.keep_hidden_states(10**6) and net.hidden_cache is None


def test_heads_that_cannot_be_are_refused(tiny_llama_path):
    with pytest.raises(UserError, match=r"\[\] tunes nothing of the language model.*use q_head: linear"):
        network(tiny_llama_path, lora=lora(target_modules=[]))
    for modules in (["q_proj", "lm_head"], "lm_head"):
        with pytest.raises(UserError, match=r"saved in place of 'lm_head'.*take it out"):
            network(tiny_llama_path, q_head="linear", lora=lora(target_modules=modules))


def trained(folder: Path, steps: int, kind: str, resume: bool = False) -> DQNTrainer:
    head = {"lm": ["lora.target_modules=[lm_head]"], "linear": ["lora.target_modules=[]", "dqn.q_head=linear"]}[kind]
    settings = {"output_dir": folder, "max_steps": steps, "save_steps": 2, "eval_steps": 0, "final_eval_prompts": 4}
    settings |= {"logging_steps": 2, "per_device_train_batch_size": 8, "hidden_cache_gb": 5e-5}  # some are forgotten
    overrides = [f"train.{key}={value}" for key, value in settings.items()]
    trainer = DQNTrainer.from_recipe(load_recipe("hello_world", [*overrides, *head, "dqn.target_sync_steps=3"]))
    trainer.train(resume=resume)
    return trainer


@pytest.mark.parametrize("kind", HEADS)
def test_a_resumed_run_repeats_bit_for_bit(tmp_path, capsys, kind):
    whole = trained(tmp_path / "whole", 8, kind)
    assert "hidden states are kept, in up to 5e-05 GB" in capsys.readouterr().out
    cache = whole.network.hidden_cache
    assert cache is not None and 0 < cache.held <= 50_000
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"step-{step:06d}")
    again = trained(tmp_path / "resumed", 8, kind, resume=True)
    for mine, other in ((whole.network.checkpoint_state(), again.network.checkpoint_state()),):
        assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "resumed")
    ]
    assert 0 < lines[0][-1]["train/hidden_cached"] < 1
    apart = CLOCKS | {"train/hidden_cached"}  # a resumed process begins with nothing
    assert [{k: v for k, v in line.items() if k not in apart} for line in lines[0]] == [
        {k: v for k, v in line.items() if k not in apart} for line in lines[1]
    ]
