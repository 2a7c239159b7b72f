"""How far to follow what was learned: exact between the base and the tuned policy, for every head, and its curve."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from llm_dqn import DQNConfig, DQNTrainer, cli
from llm_dqn.evaluation import base_and_tuned, mean_kl, measure, strength_curve
from llm_dqn.inference import evaluate_run, keep_strength
from llm_dqn.network import QNetwork
from llm_dqn.policy import BehaviourPolicy, greedy
from llm_dqn.replay import collate_tokens
from llm_dqn.rollout import rollout
from llm_dqn.strength import ScaledAdvantage
from llm_dqn.types import Episode
from tests.networks import lora, network, prompts, shake, writer

HEADS: dict[str, dict[str, Any]] = {
    "lm": {},
    "linear": {"q_head": "linear"},
    "linear, uniform prior": {"q_head": "linear", "uniform_prior": True},
    "whole model": {"lora": None},
    "whole model, linear": {"lora": None, "q_head": "linear"},
}
IDS = torch.tensor([[0, 0, 20, 21, 22, 23], [30, 31, 32, 33, 34, 35]])
MASK = (IDS > 0).long()


def tuned_network(path: str, **options: Any) -> QNetwork:
    net = network(path, **options)
    shake(net, 0.05 if options.get("lora", "adapter") is None else 0.3)
    return net


def first_token(episodes: list[Episode]) -> list[Episode | None]:
    """The number of the first token as reward."""
    return [replace(e, reward=float(e.completion_ids[0])) for e in episodes]


def logits(net: QNetwork, role: Any, width: int) -> torch.Tensor:
    """What the writer of `role` says after the first `width` tokens, without any cache."""
    with net.writer(role) as model:
        return logits_of(model, width)


# --- one token ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_every_head_writes_the_base_at_0_the_tuned_policy_at_1_and_the_mixture_elsewhere(
    tiny_llama_path: str, options: dict[str, Any]
) -> None:
    """While the network still trains: a linear head acts in the output layer and must not reach the base's logits.

    Two steps, the second from the cache, in a batch with padding on the left.
    """
    net = tuned_network(tiny_llama_path, **options)
    processors = {scale: ScaledAdvantage(net, scale, MASK[:, :5]) for scale in (-1.0, 0.0, 0.5, 1.0, 2.0)}
    for width in (5, 6):
        base, ours = logits(net, "reference", width).log_softmax(-1), logits(net, "online", width).log_softmax(-1)
        assert (base - ours).abs().max() > 0.1
        for scale, processor in processors.items():
            with net.writer("online") as model:
                layer = model.get_output_embeddings()
                mixed = processor(IDS[:, :width], logits_of(model, width)).log_softmax(-1)
                assert model.get_output_embeddings() is layer
            wanted = (base + scale * (ours - base)).log_softmax(-1)
            assert (mixed - wanted).abs().max() < 1e-5
            if scale in (0.0, 1.0):
                assert (mixed.exp() - (base if scale == 0 else ours).exp()).abs().max() < 1e-6


def logits_of(model: Any, width: int) -> torch.Tensor:
    positions = (MASK.cumsum(-1) - 1).clamp(min=0)[:, :width]
    facts = {"attention_mask": MASK[:, :width], "position_ids": positions, "use_cache": False}
    return model(input_ids=IDS[:, :width], **facts).logits[:, -1].float()


def test_every_architecture_writes_the_same_at_0_and_1(architecture_path: str) -> None:
    net = tuned_network(architecture_path)
    write, asked = writer(net, architecture_path), prompts(architecture_path)

    def written(policy: BehaviourPolicy, scale: float | None = None) -> list[list[int]]:
        extra = None if scale is None else partial(ScaledAdvantage, net, scale)
        return [e.completion_ids.tolist() for e in rollout(write, asked, policy, 0, extra=extra)]

    base = written(BehaviourPolicy(temperature=0.0, epsilon=1.0))
    assert written(greedy(), 0.0) == base != written(greedy()) == written(greedy(), 1.0)


def test_the_base_model_is_asked_for_the_last_token_of_a_prompt_alone(
    tiny_llama_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = tuned_network(tiny_llama_path)
    shapes: list[tuple[int, ...]] = []
    with net.roles.acting_as("reference") as plain:
        plain.lm_head.register_forward_hook(lambda _, given, out: shapes.append(tuple(out.shape[:2])))
    with net.writer("online"):
        ScaledAdvantage(net, 2.0, MASK[:, :5])(IDS[:, :5], torch.zeros(2, net.num_tokens))
    assert shapes == [(2, 1)]


# --- the distance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_kl_is_exact_over_the_vocabulary(
    tiny_llama_path: str, options: dict[str, Any], scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a sum over all tokens written out, in one chunk and in chunks of two states."""
    net = tuned_network(tiny_llama_path, **options)
    tokens = collate_tokens([IDS[1, :4]], [IDS[1, 4:]])
    wanted = []
    for width in (4, 5):
        base, ours = (logits(net, role, width)[1].log_softmax(-1).double() for role in ("reference", "online"))
        mixed = base + scale * (ours - base)
        mixed = mixed - mixed.logsumexp(-1)
        wanted.append(float((mixed.exp() * (mixed - base)).sum()))
    assert net.kl(tokens, scale)[0].tolist() == pytest.approx(wanted, abs=2e-6)
    monkeypatch.setattr("llm_dqn.heads.CHUNK", 1)
    assert net.kl(tokens, scale)[0].tolist() == pytest.approx(wanted, abs=4e-6)
    if scale == 1:
        assert torch.equal(net.kl(tokens), net.kl(tokens, 1.0))


# --- the curve ----------------------------------------------------------------------------------------------------


def test_the_curve_begins_and_ends_where_base_and_tuned_are(tiny_llama_path: str) -> None:
    net = tuned_network(tiny_llama_path)
    write, asked = writer(net, tiny_llama_path), prompts(tiny_llama_path) * 4
    calls: list[int] = []

    def judge(episodes: list[Episode]) -> list[Episode | None]:
        calls.append(len(episodes))
        return first_token(episodes)

    report, _ = base_and_tuned(write, asked, judge, [0, 1], scales=[2.0, 0.5, 1.0], scale_prompts=len(asked))
    curve = report["strength"]
    assert [point["beta_scale"] for point in curve] == [0.0, 0.5, 1.0, 2.0]
    assert calls == [32, 16] * 2 + [32] * 2  # 0 and 1 cost nothing
    for point, side in ((curve[0], "base"), (curve[2], "tuned")):
        figures = report[side]
        assert (point["reward"], point["reward_ci"]) == (figures["reward"], figures["reward_ci"])
        assert point["kl"] == pytest.approx(figures["kl"], abs=1e-9)
    kls = [point["kl"] for point in curve]
    assert kls == sorted(kls) and kls[0] == 0 < kls[1]


def test_fewer_prompts_make_a_curve_of_the_first_ones(tiny_llama_path: str) -> None:
    net = tuned_network(tiny_llama_path)
    write, asked = writer(net, tiny_llama_path), prompts(tiny_llama_path)

    def judge(episodes: list[Episode]) -> list[Episode | None]:
        return [replace(e, reward=float(len(e.prompt))) for e in episodes]

    report, _ = base_and_tuned(write, asked, judge, [0, 1], scales=[1.0], scale_prompts=2)
    wanted = sum(len(str(prompt.prompt)) for prompt in asked[:2]) / 2
    assert [(point["reward"], point["prompts"]) for point in report["strength"]] == [(wanted, 2)] * 2
    tuned = measure(write, asked, judge, [0, 1])
    first = [tuned.written[index] for index in (0, 1, 4, 5)]
    assert report["strength"][1]["kl"] == pytest.approx(mean_kl(write, first))


def test_reward_rises_from_turned_around_over_base_and_half_to_tuned(trained_run: Path) -> None:
    """On a run that learned: the policy turned around earns less than the base model."""
    report, _ = evaluate_run(str(trained_run), seeds=range(8), beta_scales=[-1.0, 0.5])
    turned, base, half, tuned = (point["reward"] for point in report["strength"])
    assert turned < base < half < tuned
    kls = {point["beta_scale"]: point["kl"] for point in report["strength"]}
    assert kls[0.0] == 0 < kls[0.5] < kls[1.0] == pytest.approx(report["tuned"]["kl"]) and kls[-1.0] > 0


def test_strengths_named_in_a_recipe_are_measured_after_training(tiny_llama_path: str, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": f"the film {number}"} for number in range(10)])
    small = {"max_completion_length": 4, "prompts_per_collect": 4, "learning_starts": 4, "capacity": 32}
    more = {"eval_steps": 0, "final_beta_scales": [2, 0.5], "q_head": "linear", "learning_rate": 0.01}
    args = DQNConfig(output_dir=str(tmp_path / "run"), max_steps=2, **small, **more)
    trainer = DQNTrainer(
        tiny_llama_path, lambda prompts, completions, **_: [float(len(c)) for c in completions], args, rows,
        peft_config=lora(),
    )  # fmt: skip
    report = trainer.train()
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert written == report and [point["beta_scale"] for point in written["strength"]] == [0.0, 0.5, 1.0, 2.0]
    assert written["strength"][2]["reward"] == written["tuned"]["reward"]


# --- where it is kept ---------------------------------------------------------------------------------------------


@pytest.fixture
def copied(trained_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained_run, tmp_path / "run")
    return tmp_path / "run"


def test_the_command_puts_the_curve_into_the_evaluation_of_the_run_and_changes_nothing_else(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((copied / "evaluation.json").read_text())
    with pytest.raises(SystemExit) as left:
        cli.main(["evaluate", str(copied), "--beta-scales", "0,0.5,1,1.5,2", "--max-prompts", "4"])
    assert not left.value.code
    after = json.loads((copied / "evaluation.json").read_text())
    assert [point["beta_scale"] for point in after.pop("strength")] == [0, 0.5, 1, 1.5, 2]
    assert after == before and not list(copied.glob("*.tmp"))
    shown = capsys.readouterr().out
    assert f"the curve is in {copied}/evaluation.json now" in shown
    assert "0, the base" in shown and "1, as tuned" in shown and "KL from base, nats/token" in shown


def test_a_curve_on_other_prompts_or_rewards_does_not_go_into_the_run(copied: Path, tmp_path: Path) -> None:
    before = (copied / "evaluation.json").read_text()
    curve = [{"beta_scale": 1.0, "reward": 1.0, "reward_ci": [1.0, 1.0], "kl": 0.0}]
    own = {"split": "validation", "strength": curve}
    for elsewhere in ({"prompts_from": "p.jsonl"}, {"rewards_from": ["a.py:f"]}, {"split": "test"}):
        assert keep_strength(str(copied), own | elsewhere) is None
    assert keep_strength(str(copied), {"split": "validation"}) is None
    assert (copied / "evaluation.json").read_text() == before
    assert keep_strength(str(tmp_path), own) is None  # no run at all
    assert keep_strength(str(copied), own) == copied / "evaluation.json"
    assert json.loads((copied / "evaluation.json").read_text()) == json.loads(before) | {"strength": curve}


def test_what_was_measured_elsewhere_says_so(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "问候："}\n')
    report, _ = evaluate_run(str(copied), prompts=str(tmp_path / "p.jsonl"), beta_scales=[1.0])
    assert report["prompts_from"] == str(tmp_path / "p.jsonl") and keep_strength(str(copied), report) is None


def test_generate_refuses_what_is_no_number(copied: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = ["--prompts", "p.jsonl", "--output", str(tmp_path / "o.jsonl")]
    with pytest.raises(SystemExit) as left:
        cli.main(["generate", str(copied), *files, "--beta-scale", "inf"])
    assert left.value.code == 2 and capsys.readouterr().err.startswith("--beta-scale inf: expected a finite number")


def test_a_curve_needs_no_known_points(tiny_llama_path: str) -> None:
    """Measured anew, 0 and 1 give what base and tuned policy are, within rounding of the same draws."""
    net = tuned_network(tiny_llama_path)
    write, asked = writer(net, tiny_llama_path), prompts(tiny_llama_path) * 8
    curve = strength_curve(write, asked, first_token, [0], [0.0, 1.0], known={})
    for point, base in ((curve[0], True), (curve[1], False)):
        figures = measure(write, asked, first_token, [0], base=base).figures
        assert point["reward"] == figures["reward"] and point["kl"] == pytest.approx(figures["kl"], abs=1e-6)
