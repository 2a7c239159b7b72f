"""Starts `vllm serve` beside the learner, on its device, where no server's address is given.

Flags and environment are those of vLLM's documentation: "CLI Reference" (vllm serve), "LoRA Adapters", "Environment
Variables", "Usage Stats Collection". Not tried on a real vLLM.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

from llm_dqn.errors import UserError
from llm_dqn.terminal import say
from llm_dqn.vllm_guard import LEAVING
from llm_dqn.vllm_server import DIRECT

HOST = "127.0.0.1"
START_SECONDS = 600.0  # for the server to load the model and to answer
PERIOD = 0.2  # seconds between two looks whether it does
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes
LAST_LINES = 15  # of the log, shown when the server ended early


@dataclass(frozen=True)
class Served:
    """What a server is to serve. length: of prompt and completion, in tokens. memory: its share of the GPU's."""

    model: str
    rank: int
    length: int
    memory: float
    dtype: str = "auto"
    revision: str | None = None
    remote_code: bool = False

    def options(self) -> list[str]:
        """Of `vllm serve`, without its address. Raises UserError for a rank that vLLM does not take."""
        fitting = [rank for rank in RANKS if rank >= self.rank]
        if not fitting:
            raise UserError(f"lora.r: engine vllm takes ranks up to {RANKS[-1]}, got {self.rank}")
        options = [self.model, "--enable-lora", "--max-lora-rank", str(fitting[0]), "--dtype", self.dtype]
        options += ["--max-model-len", str(self.length), "--gpu-memory-utilization", str(self.memory)]
        options += ["--revision", self.revision] if self.revision else []
        options += ["--trust-remote-code"] if self.remote_code else []
        return [*options, "--disable-uvicorn-access-log"]


def program() -> str:
    """Path of `vllm`: the first on PATH, or this Python's own. Raises UserError where it cannot be started."""
    found = shutil.which("vllm") or shutil.which("vllm", path=str(Path(sys.executable).parent))
    if found is None:
        raise UserError(
            "no program `vllm` is installed that the run could start; `pip install vllm`, give the address of a server "
            "as rollout.vllm_url, or set rollout.engine: generate"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "engine vllm starts a server of its own for a run of one process alone; start one for all and give its "
            "address as rollout.vllm_url"
        )
    return found


def check_engine(engine: str, url: str | None) -> None:
    """Raises UserError where engine vllm needs a server to be started, and none can be."""
    if engine == "vllm" and url is None:
        program()


class LocalServer:
    """A server that this process starts, and that ends with it.

    gpu: number of the learner's GPU among those that it sees; None where it has none. log: gets the server's output.
    Raises UserError as `program` and `Served.options` do.
    """

    def __init__(self, served: Served, gpu: int | None, log: Path) -> None:
        self._command = [program(), "serve", *served.options()]
        self._environment, self._log = environment(served.model, gpu), log

    def start(self) -> str:
        """Its address, once it answers. Raises UserError with the end of its log when it does not."""
        with socket.socket() as chosen:
            chosen.bind((HOST, 0))
            port = chosen.getsockname()[1]
        command = [*self._command, "--host", HOST, "--port", str(port)]
        say(f"starting vLLM beside the learner, which may take minutes; its log is {self._log}")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            guard = subprocess.Popen(
                [sys.executable, "-I", str(Path(__file__).with_name("vllm_guard.py")), str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # Ctrl-C in a terminal is the learner's to handle
            )
        weakref.finalize(self, _end, guard)
        url = f"http://{HOST}:{port}"
        self._wait(guard, url)
        return url

    def _wait(self, guard: "subprocess.Popen[bytes]", url: str) -> None:
        until = time.monotonic() + START_SECONDS
        while not _healthy(url):
            if guard.poll() is not None:
                raise UserError(f"rollout.engine: `vllm serve` ended with exit code {guard.returncode}; {self._told()}")
            if time.monotonic() > until:
                _end(guard)
                raise UserError(f"rollout.engine: vLLM did not answer within {START_SECONDS:g} s; {self._told()}")
            time.sleep(PERIOD)

    def _told(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        return "\n".join((f"the end of {self._log}:", *lines))


def environment(model: str, gpu: int | None) -> dict[str, str]:
    """Of a server that shows one GPU to it, takes adapters while it runs, and stays off the network where it can."""
    found = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1"}
    if Path(model).is_dir():
        found["HF_HUB_OFFLINE"] = "1"
    if gpu is not None:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        found["CUDA_VISIBLE_DEVICES"] = seen.split(",")[gpu] if seen else str(gpu)
    return found


def _healthy(url: str) -> bool:
    try:
        with DIRECT.open(f"{url}/health", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:  # nobody listens yet, or the engine is not ready
        return False


def _end(guard: "subprocess.Popen[bytes]") -> None:
    guard.terminate()
    try:
        guard.wait(LEAVING + 5)
    except subprocess.TimeoutExpired:
        guard.kill()
        guard.wait()
