"""What is not finite, Q that runs away, memory that runs out, engines that lose rows, targets that should lag."""

from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm_dqn.errors import RunError
from llm_dqn.memory import OutOfMemory
from llm_dqn.numerics import QAlarm
from tests.faults.runs import QUIET, WEIGHTS
from tests.test_trainer import metrics, trainer

# --- 36: what is not finite -------------------------------------------------------------------------------------------


def test_case_36_a_gradient_that_is_not_finite_leaves_the_step_out(tiny_llama_path, tmp_path, capsys):
    """It is counted and told with the replay's slots; the weights stay as they were, and finite."""
    run = trainer(tiny_llama_path, tmp_path, max_steps=4, **QUIET)
    run.parts.trainable[0].register_hook(lambda gradient: gradient * float("inf") if run.step == 2 else gradient)
    seen, update = {}, run.update

    def watched(batches: Any) -> None:
        before = [parameter.detach().clone() for parameter in run.parts.trainable]
        update(batches)
        seen[run.step] = all(torch.equal(a, b) for a, b in zip(before, run.parts.trainable, strict=True))

    run.update = watched
    run.train()
    assert seen == {0: False, 1: False, 2: True, 3: False}
    assert [line["train/nonfinite_steps"] for line in metrics(tmp_path)] == [0, 1]
    assert all(value is not None for value in metrics(tmp_path)[-1].values())
    assert "step 2: loss or gradient is not finite" in capsys.readouterr().out
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / WEIGHTS[0]).values())


def test_case_36_many_such_steps_end_the_run_with_the_last_good_checkpoint(tiny_llama_path, tmp_path):
    """After `train.max_nonfinite_steps` in a row; the episodes are named, and no priority was spoiled by them."""
    options = QUIET | {"save_steps": 2, "max_nonfinite_steps": 3, "prioritized": True, "success_share": 0.0}
    run = trainer(tiny_llama_path, tmp_path, max_steps=9, **options)
    td_target = run.td_target

    def poisoned(batch: Any) -> Any:
        if run.step >= 2:
            batch.rewards[0] += float("nan")
        return td_target(batch)

    run.td_target = poisoned
    with pytest.raises(RunError) as ended:
        run.train()
    message = str(ended.value)
    assert "3 steps in a row" in message and "step 4: Q or its target is not finite for the replay's slots [" in message
    assert f"the last good checkpoint is {tmp_path}/checkpoints/step-000004" in message
    assert np.isfinite(run.replay.priorities).all()
    assert all(parameter.isfinite().all() for parameter in run.parts.trainable)


def test_case_36_weights_that_are_nan_are_found_at_the_start(tiny_llama_path, tmp_path):
    """Greedy generation would write token 0 from them without a word."""
    run = trainer(tiny_llama_path, tmp_path, **QUIET)
    with torch.no_grad():
        run.network.model.get_base_model().model.embed_tokens.weight[5] = float("nan")
        run.network.model.get_base_model().lm_head.weight[:] = float("nan")
    with pytest.raises(RunError, match="the base model's probabilities are not finite"):
        run.train()


# --- 37: Q runs away --------------------------------------------------------------------------------------------------


def test_case_37_q_beyond_the_reach_of_rewards_raises_an_alarm(tiny_llama_path, tmp_path, capsys):
    """One line when |Q| leaves what rewards can be, again only when it doubles; `train/q_max` is in the metrics."""
    run = trainer(tiny_llama_path, tmp_path, max_steps=6, **QUIET)
    update = run.update

    def exploding(batches: Any) -> None:
        if run.step == 2:
            run.network.start_values_at(1000.0)
        update(batches)

    run.update = exploding
    run.train()
    peaks = [line["train/q_max"] for line in metrics(tmp_path)]
    assert peaks[0] < 2 and peaks[1] > 900
    assert capsys.readouterr().out.count("ALARM |Q| reached") == 1


def test_case_37_the_alarm_knows_what_rewards_can_reach():
    """Twice the largest reward is still possible; the alarm sounds beyond that, and again at twice as much."""
    said: list[str] = []
    alarm = QAlarm(said.append)
    alarm.seen(np.array([0.0, -4.0]))
    for q_max in (8.5, None, float("nan"), 9.5, 18.0, 19.5):
        alarm.look(1, q_max, beta=0.1)
    assert [line.split()[5] for line in said] == ["9.5,", "19.5,"]


# --- 38: out of memory ------------------------------------------------------------------------------------------------


def shrink(run: Any, rows: int) -> list[int]:
    """A device on which so many rows fit in a learner's pass; returns the sizes of those that went through."""
    sizes, forward = [], run.network.forward

    def limited(batch: Any, *more: Any) -> Any:
        if len(batch.slots) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        sizes.append(len(batch.slots))
        return forward(batch, *more)

    run.network.forward = limited
    return sizes


def test_case_38_out_of_memory_in_an_update_halves_the_batch_and_keeps_its_gradient(tiny_llama_path, tmp_path, capsys):
    """Eight episodes become twice four in the same optimizer step: the same weights up to rounding."""
    results, sizes = [], []
    for rows in (8, 4):
        run = trainer(tiny_llama_path, tmp_path / str(rows), max_steps=3, learning_rate=1e-4, **QUIET)
        sizes.append(shrink(run, rows))
        run.train()
        results.append([parameter.detach().clone() for parameter in run.parts.trainable])
    assert sizes == [[8] * 3, [4] * 6]
    assert all(torch.allclose(whole, halves, atol=1e-6) for whole, halves in zip(*results, strict=True))
    assert "out of memory while learning, 8 rows at a time: from now on 4" in capsys.readouterr().out


def test_case_38_out_of_memory_again_saves_and_stops(tiny_llama_path, tmp_path):
    """With a sentence that names the cure; what was saved goes on as if nothing had happened."""
    options = QUIET | {"max_steps": 5}
    run = trainer(tiny_llama_path, tmp_path / "run", **options)
    update = run.update

    def starving(batches: Any) -> None:
        if run.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        update(batches)

    run.update = starving
    with pytest.raises(OutOfMemory, match=r"out of memory while learning, 4 rows at a time.*halve train\.per_device"):
        run.train()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    trainer(tiny_llama_path, tmp_path / "run", **options).train(resume=True)
    trainer(tiny_llama_path, tmp_path / "whole", **options).train()
    for name in ("samples.jsonl", *WEIGHTS):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_case_38_out_of_memory_in_a_rollout_writes_fewer_at_a_time(tiny_llama_path, tmp_path, capsys, monkeypatch):
    """The prompts stay the same; the completions are other draws, since rows of a batch share one random stream."""
    run = trainer(tiny_llama_path, tmp_path, max_steps=2, **QUIET)
    base = run.network.model.get_base_model()
    generate, sizes = base.generate, []

    def limited(**inputs: Any) -> Any:
        if len(inputs["input_ids"]) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
        sizes.append(len(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(base, "generate", limited)
    run.collect()
    assert "out of memory while writing completions, 8 rows at a time: from now on 4" in capsys.readouterr().out
    assert sum(sizes) == len(run.replay) == 8 and max(sizes) <= 4


# --- 41: an engine that loses rows ------------------------------------------------------------------------------------


def test_case_41_an_engine_that_returns_fewer_completions_is_found_out(tiny_llama_path, tmp_path, monkeypatch):
    """No completion is ever given to the prompt of another."""
    run = trainer(tiny_llama_path, tmp_path, **QUIET)
    base = run.network.model.get_base_model()
    generate = base.generate
    monkeypatch.setattr(base, "generate", lambda **inputs: generate(**inputs)[1:])
    with pytest.raises(RunError, match="8 completions were asked of the engine and 7 came back"):
        run.collect()


# --- 42: the target network -------------------------------------------------------------------------------------------


def test_case_42_the_target_is_saved_loaded_frozen_and_never_shared(tiny_llama_path, tmp_path):
    """After resuming it lags as it did, no gradient ever reaches it, and the adapter that is shared holds no trace."""
    options = QUIET | {"max_steps": 3, "target_sync_steps": 2}
    run = trainer(tiny_llama_path, tmp_path, **options)
    run.train()

    def sides(state: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        online = sorted(key for key in state if key.startswith(("online.", "heads.")))
        twins = [key.replace("online.", "target.", 1) if "online." in key else f"target_{key}" for key in online]
        return [state[key] for key in online], [state[key] for key in twins]

    online, target = sides(run.network.checkpoint_state())
    assert any(not torch.equal(a, b) for a, b in zip(online, target, strict=True))  # one step after the sync
    again = trainer(tiny_llama_path, tmp_path, **(options | {"max_steps": 4}))
    again.begin(resume=True)
    assert all(torch.equal(a, b) for a, b in zip(target, sides(again.network.checkpoint_state())[1], strict=True))
    frozen = [*again.network.target_heads.parameters()]
    frozen += [value for name, value in again.network.model.named_parameters() if ".target." in name]
    again.learn_from([again.sample()])
    again.logbook.close()
    assert frozen and all(value.grad is None and not value.requires_grad for value in frozen)
    held = {id(value) for group in again.parts.optimizer.param_groups for value in group["params"]}
    assert not held & {id(value) for value in frozen}
    shared = tmp_path / "adapter"
    assert not list(shared.rglob("*target*"))
    assert not [key for file in shared.glob("*.safetensors") for key in load_file(file) if "target" in key]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_path), shared)
    assert list(plain.peft_config) == ["default"]
