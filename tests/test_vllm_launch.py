"""A vLLM server that the run starts itself: a real child process that computes, and how it ends. Not on real vLLM."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_dqn.errors import StepFailed, UserError
from llm_dqn.preflight import preflight
from llm_dqn.recipe import RecipeError, load_recipe
from llm_dqn.trainer import DQNTrainer
from llm_dqn.vllm_launch import LocalServer, Served, environment
from llm_dqn.vllm_server import VLLMServer

ROOT = Path(__file__).parents[1]
COMPUTES = f'PYTHONPATH="{ROOT}" exec "{sys.executable}" -m tests.vllm_double "$@"'
# The file "health" is what it serves; beside it a process that does not end by itself.
ANSWERS = """
while [ "$1" != --port ]; do shift; done
sleep 600 &
echo "$$ $!" > "$HERE/pids"
touch "$HERE/health"
exec "$PYTHON" -m http.server --bind 127.0.0.1 --directory "$HERE" "$2"
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a program `vllm` on PATH."""

    def install(body: str) -> None:
        program = tmp_path / "bin" / "vllm"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setenv("PYTHON", sys.executable)
    return install


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def all_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 15
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def settings(run: Path) -> list[str]:
    facts = [f"train.output_dir={run}", "rollout.engine=vllm", "train.max_steps=4", "replay.updates_per_collect=2"]
    facts += ["rollout.prompts_per_collect=4", "replay.learning_starts=4", "train.per_device_train_batch_size=4"]
    facts += ["rollout.epsilon.start=0", "rollout.epsilon.end=0", "lora.r=5"]
    return [*facts, "train.eval_steps=0", "train.save_steps=0", "train.final_eval_prompts=2"]


def test_a_run_starts_its_own_server_trains_on_what_it_writes_and_ends_it(stand_in, tmp_path):
    stand_in(COMPUTES)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("of an earlier run")
    run = DQNTrainer.from_recipe(load_recipe("hello_world", settings(tmp_path / "run")))
    assert not (tmp_path / "run" / "vllm.log").exists()  # the folder is not the run's yet
    run.train()
    log = (tmp_path / "run" / "vllm.log").read_text()
    facts = json.loads(log.splitlines()[0])
    longest = max(len(prompt.ids) for prompt in run.parts.stream.prompts + run.parts.eval_prompts)
    expected = {"enable_lora": True, "max_lora_rank": 8, "gpu_memory_utilization": 0.3, "dtype": "auto"}
    expected |= {"max_model_len": longest + 8, "revision": None, "trust_remote_code": False}
    expected |= {"HF_HUB_OFFLINE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1"}
    assert {name: facts[name] for name in expected} == expected
    assert log.count("loading llm_dqn-") >= 4  # the probe's adapter, those of both collections, the final one
    assert "secret" not in log and all(map(alive, facts["pids"]))  # there for what a script still asks of the trainer
    del run
    gc.collect()
    assert all_gone(facts["pids"])


@pytest.mark.parametrize("ending", ["killed", "terminated", "returned", "failed"])
def test_nothing_of_the_server_is_left_however_its_run_ends(stand_in, tmp_path, ending):
    stand_in(ANSWERS)
    last = {"returned": "pass", "failed": "raise RuntimeError"}.get(ending, "time.sleep(60)")
    script = (
        "import pathlib, sys, time\n"
        "from llm_dqn.vllm_launch import LocalServer, Served\n"
        "server = LocalServer(Served('m', 4, 16, 0.3), None, pathlib.Path(sys.argv[1]))\n"
        f"print(server.start(), flush=True)\n{last}\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "vllm.log")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().decode() for _ in range(2)]
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert lines[1].startswith("http://127.0.0.1:") and (ending in ("returned", "failed") or all(map(alive, pids)))
        if ending == "killed":
            process.kill()
        elif ending == "terminated":
            process.terminate()
    assert process.returncode == {"killed": -signal.SIGKILL, "terminated": -signal.SIGTERM, "failed": 1}.get(ending, 0)
    assert all_gone(pids)


def test_a_server_that_is_lost_later_leaves_nothing_and_fails_the_step(stand_in, tmp_path):
    stand_in(ANSWERS)
    server = VLLMServer(LocalServer(Served("m", 4, 16, 0.3), None, tmp_path / "vllm.log").start, str(tmp_path))
    assert server.url.startswith("http://127.0.0.1:")
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    os.kill(pids[0], signal.SIGKILL)
    assert all_gone(pids)
    with pytest.raises(StepFailed, match=r"no vLLM server answers at .* this run started it: see vllm.log"):
        server.complete(["m"], [[1]], {}, seed=0)


def test_a_server_that_ends_early_or_never_answers_is_told_with_the_end_of_its_log(stand_in, tmp_path, monkeypatch):
    stand_in("echo no memory left; [ -e $HERE/slow ] && exec sleep 600; exit 3")
    server = LocalServer(Served("m", 4, 16, 0.3), None, tmp_path / "vllm.log")
    with pytest.raises(UserError, match=r"(?s)ended with exit code 3; the end of .*vllm.log:\nno memory left"):
        server.start()
    (tmp_path / "slow").touch()
    monkeypatch.setattr("llm_dqn.vllm_launch.START_SECONDS", 0.5)
    with pytest.raises(UserError, match=r"(?s)did not answer within 0.5 s; .*no memory left"):
        server.start()


def test_a_run_that_cannot_start_a_server_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    recipe = load_recipe("hello_world", [f"train.output_dir={tmp_path}/run", "rollout.engine=vllm"])
    monkeypatch.setattr("llm_dqn.models.load_config", None)  # would fail otherwise
    with pytest.raises(RecipeError, match=r"rollout.engine.*no program `vllm` .*pip install vllm.*rollout.vllm_url"):
        DQNTrainer.from_recipe(recipe)
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    problems, _ = preflight(recipe)
    assert [problem.key for problem in problems] == ["rollout.engine"]
    with pytest.raises(RecipeError, match=r"vllm_url.*collectors cannot share one that the run starts"):
        load_recipe("hello_world", [f"train.output_dir={tmp_path}/run", "rollout.engine=vllm", "rollout.overlap=1"])
    (tmp_path / "vllm").touch(0o755)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="of one process alone"):
        LocalServer(Served("m", 4, 16, 0.3), None, tmp_path / "vllm.log")
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(UserError, match="takes ranks up to 512, got 600"):
        LocalServer(Served("m", 600, 16, 0.3), None, tmp_path / "vllm.log")


def test_the_learners_gpu_is_the_only_one_that_the_server_sees(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert environment("org/model", 1)["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    found = environment("org/model", 1)
    assert found["CUDA_VISIBLE_DEVICES"] == "7" and "HF_HUB_OFFLINE" not in found
