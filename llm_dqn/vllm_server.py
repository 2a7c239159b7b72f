"""A vLLM server over its HTTP interface: completions with log-probabilities, and adapters loaded while it runs.

The server is started by the run itself (`vllm_launch`), or by its user, with the same base model:

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank R

vLLM's documentation: "OpenAI-Compatible Server" (/v1/models, /v1/completions) and "LoRA Adapters"
(/v1/load_lora_adapter, /v1/unload_lora_adapter). Weights are never merged: the server reads the adapter's folder.
"""

import hashlib
import json
import os
import secrets
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llm_dqn.errors import StepFailed, UserError

AT_ONCE = 64  # requests under way; the server batches them
TIMEOUT = 600.0  # seconds that an answer may take
HERE = ("127.0.0.1", "localhost")
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy knows this machine's own ports
# What a model's generation_config.json would otherwise put in.
UNCHANGED = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class VLLMServer:
    """url: of the server, "http://127.0.0.1:8000", or what starts one at its first use and returns its address.
    folder: where adapters are left for it; None: a temporary one, which only a server on the same machine can read.

    Raises UserError where no server answers, or none that serves a base model.
    """

    def __init__(self, url: str | Callable[[], str], folder: str | None = None) -> None:
        self._address = url
        if isinstance(url, str):
            if not url.startswith(("http://", "https://")):
                raise UserError(f"rollout.vllm_url: {url} is no address like http://127.0.0.1:8000")
            _ = self.base_model  # asked for now, so that what is wrong is said now
        self._temporary = tempfile.TemporaryDirectory(prefix="llm-dqn-adapters-") if folder is None else None
        self._folder = Path(self._temporary.name if self._temporary else str(folder)).absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._mine = f"llm_dqn-{os.getpid()}-{secrets.token_hex(3)}"  # several processes may share a server
        self._loaded: str | None = None

    @cached_property
    def url(self) -> str:
        """Where it answers."""
        address = self._address if isinstance(self._address, str) else self._address()
        return address.rstrip("/").removesuffix("/v1")

    @cached_property
    def base_model(self) -> str:
        """The name under which it serves the base model."""
        try:
            listed = self._ask("/v1/models")["data"]
        except StepFailed as error:
            raise UserError(f"rollout.vllm_url: {error}") from error
        bases = [model["id"] for model in listed if not model.get("parent")]
        if not bases:
            raise UserError(f"rollout.vllm_url: {self.url} serves no base model, only {listed}")
        return str(bases[0])

    def adapter(self, save: Callable[[Path], None]) -> str:
        """The name under which the server knows the adapter that `save` writes into a folder; loads it when it is new.

        A new name for other weights, so that nothing the server has cached for the old ones is taken for theirs.
        """
        fresh = Path(tempfile.mkdtemp(dir=self._folder))
        save(fresh)
        digest = hashlib.sha256((fresh / "adapter_model.safetensors").read_bytes()).hexdigest()[:12]
        name = f"{self._mine}-{digest}"
        if name == self._loaded:
            shutil.rmtree(fresh)
            return name
        fresh.chmod(0o755)  # the server may run as somebody else
        folder = fresh.rename(self._folder / name)
        self._ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        if self._loaded is not None:
            self._ask("/v1/unload_lora_adapter", {"lora_name": self._loaded})
            shutil.rmtree(self._folder / self._loaded)
        self._loaded = name
        return name

    def complete(
        self, models: Sequence[str], prompts: Sequence[list[int]], sampling: dict[str, Any], seed: int
    ) -> list[tuple[list[int], list[float]]]:
        """(token ids, the stop token included; log-probabilities before temperature) of one completion a prompt.

        models: which model or adapter continues each prompt. Each is a request of its own with a
        seed of its own: in one request all would draw alike.
        """

        def one(row: int) -> tuple[list[int], list[float]]:
            draws = int.from_bytes(hashlib.sha256(f"{seed} {row}".encode()).digest()[:4], "big") >> 1
            body = {
                "model": models[row],
                "prompt": prompts[row],
                "seed": draws,
                "logprobs": 1,
                "return_token_ids": True,
            }
            # `ignore_eos` leaves the stop tokens we name as the only ones
            answer = self._ask("/v1/completions", body | UNCHANGED | sampling | {"ignore_eos": True})
            choice = answer["choices"][0]
            if choice.get("token_ids") is None or not choice.get("logprobs"):
                raise StepFailed(f"{self.url} answers without token_ids or logprobs; they need vLLM 0.10.2 or newer")
            return choice["token_ids"], choice["logprobs"]["token_logprobs"]

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(one, range(len(prompts))))

    @property
    def _open(self) -> Callable:
        return DIRECT.open if urlsplit(self.url).hostname in HERE else urllib.request.urlopen

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that the server answers; what is no JSON as text. Raises StepFailed with what it says."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with self._open(request, timeout=TIMEOUT) as response:
                text = response.read().decode()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            cure = ""
            if path.endswith("lora_adapter") and error.code == 404:
                cure = "; start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            raise StepFailed(f"the vLLM server refused {path} ({error.code}): {said:.300}{cure}") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            ours = "" if isinstance(self._address, str) else "; this run started it: see vllm.log in the run's folder"
            raise StepFailed(f"no vLLM server answers at {self.url}: {reason}{ours}") from error
        try:
            return json.loads(text)
        except ValueError:
            return text
