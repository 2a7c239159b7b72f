"""One of the two processes of `test_sharding`: the same network whole and sharded, on the same episodes."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from llm_dqn import early_stopping, sharding
from llm_dqn.policy import sampled
from llm_dqn.reduction import sum_gradients
from llm_dqn.replay import PrefixReplay
from llm_dqn.rollout import rollout
from tests.networks import shake
from tests.test_trainer import ROWS, trainer


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(network) -> dict[str, torch.Tensor]:
    return {name: full(p.grad).clone() for name, p in network.named_parameters() if p.grad is not None}


def largest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def main(path: str, folder: str) -> None:
    torch.set_num_threads(1)
    run = trainer(path, Path(folder) / "run", max_grad_norm=1e9, temperature=1.0, advantage_weight=1.0)
    network, rank = run.network, run.parts.accelerator.process_index
    episodes = run.score(rollout(run.parts.writer, run.parts.stream.prompts[:8], sampled(), seed=5))
    shake(network, 0.05)
    network.sync_target(0.5)
    replay = PrefixReplay(16)
    replay.add(episodes)
    every, mine = replay.batch(torch.arange(8).numpy()), replay.batch(torch.arange(4).numpy() + 4 * rank)
    count, weight = every.action_mask.sum().float(), torch.tensor(1.0)

    def learn(batch) -> float:
        network.zero_grad()
        target = run.td_target(batch)
        loss, _ = run.parts.objective(network, batch, target, count, weight)
        loss.backward()
        return loss.item()

    alone = {"loss": learn(every), "gradients": gradients(network)}
    alone["target"] = run.td_target(every).returns
    before = {name: full(value).clone() for name, value in network.checkpoint_state().items()}

    sharding.shard(network, init_device_mesh("cpu", (2,)))
    notes: dict = {}
    layers = [p for layer in sharding.decoder_layers(network) for p in layer.parameters()]
    notes["sharded"] = all(isinstance(p, DTensor) for p in layers)
    notes["share"] = sum(p.to_local().numel() for p in layers) / sum(p.numel() for p in layers)
    loss = torch.tensor(learn(mine))
    trainable = [p for p in network.parameters() if p.requires_grad]
    sum_gradients([p for p in trainable if not isinstance(p, DTensor)], torch.zeros(1))
    dist.all_reduce(loss)
    notes["loss"] = abs(loss.item() - alone["loss"])
    notes["gradients"] = largest(alone["gradients"], gradients(network))
    notes["largest_gradient"] = max(g.abs().max().item() for g in alone["gradients"].values())
    norm = torch.stack([g.square().sum() for g in alone["gradients"].values()]).sum().sqrt()
    notes["norm"] = abs(sharding.clip_gradients(trainable, 1e9).item() - norm.item())
    notes["targets"] = (run.td_target(every).returns - alone["target"]).abs().max().item()

    with CommDebugMode() as communication:
        network.sync_target(0.25)
    notes["sync_messages"] = communication.get_total_counts()
    synced = {name: full(value).clone() for name, value in network.checkpoint_state().items()}
    old = {name: value for name, value in before.items() if name.startswith("target.")}
    wanted = {name: value.lerp(before[name.replace("target.", "online.")], 0.25) for name, value in old.items()}
    notes["synced"] = largest(wanted, {n: v for n, v in synced.items() if n.startswith("target.")})

    state = network.checkpoint_state()
    sharding.save(state, Path(folder) / "sharded")
    with torch.no_grad():
        for value in state.values():
            value.zero_() if not isinstance(value, DTensor) else value.to_local().zero_()
    sharding.load(state, Path(folder) / "sharded")
    notes["restored"] = largest(synced, {name: full(value) for name, value in network.checkpoint_state().items()})
    notes["runs"] = runs(path, Path(folder), rank)
    (Path(folder) / f"notes-{rank}.json").write_text(json.dumps(notes))


def runs(path: str, folder: Path, rank: int) -> dict:
    """The same run with whole copies, with shares, and with shares that go on from a checkpoint; how far apart."""
    options = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "updates_per_collect": 2}
    options |= {"learning_starts": 4, "per_device_train_batch_size": 4, "max_grad_norm": 0.01, "target_tau": 0.5}
    ends = {}
    for name, how in (("none", "none"), ("fsdp2", "fsdp2"), ("cut", "fsdp2")):
        if name == "cut":
            cut = trainer(path, folder / name, sharding=how, **(options | {"max_steps": 2}))
            cut.train()
            shares = [parameter for parameter in cut.parts.trainable if isinstance(parameter, DTensor)]
        run = trainer(path, folder / name, sharding=how, **options)
        run.train(resume=name == "cut")
        ends[name] = {k: full(v) for k, v in run.network.checkpoint_state().items()}
    logged = [from_log(path, folder / name, sharding=name) for name in ("none", "fsdp2")]
    opened = load_file(folder / "fsdp2" / "adapter" / "adapter_model.safetensors")
    saved = {f"online.{name}": value for name, value in opened.items()}
    return {
        "shares": len(shares),
        "apart": largest(ends["none"], ends["fsdp2"]),
        "kept_steps": [run.parts.early_stopping.best_step for run in logged],
        "own": [len(run.parts.sharpening.own) for run in logged],
        "own_alike": len(set(logged[0].processes.gather(own_tokens(logged[0])))) == 1,
        "kept_apart": largest(*({k: full(v) for k, v in run.network.checkpoint_state().items()} for run in logged)),
        "resumed": largest(ends["fsdp2"], ends["cut"]),
        "saved": largest(saved, {name: value for name, value in ends["fsdp2"].items() if name in saved}),
    }


def own_tokens(run) -> tuple[int, ...]:
    """All tokens of the own completions that this process learns from."""
    return tuple(run.parts.sharpening.own.state_arrays()["tokens"].tolist())


def from_log(path: str, folder: Path, **options):
    """A run on logged completions alone that has put back the policy under which held-out successes were likeliest, and
    that has learned from own completions, for which two processes wrote.
    """
    early_stopping.sharpened = torch.ones_like
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.jsonl"
    rows = [{"prompt": row["prompt"], "completion": " eee", "reward": min(n % 3, 1)} for n, row in enumerate(ROWS)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = {"warm_start": str(log), "max_scored_completions": 0, "held_out_share": 0.5, "max_steps": 3}
    run = trainer(path, folder / "logged", **alone, max_grad_norm=0.01, eval_steps=0, save_steps=0, **options)
    run.train()
    return run


if __name__ == "__main__":
    main(*sys.argv[1:])
