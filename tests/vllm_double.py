"""A loopback server that speaks the part of vLLM's HTTP interface that a run uses, on a real model and PEFT adapters.

Written from vLLM's documentation of its OpenAI-compatible server. It computes; nothing of what it answers is canned.
As a program it takes the options of `vllm serve` that a run gives, and refuses others.
"""

import argparse
import json
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

BASE = "served-base"


class Double:
    """Serves the model in `path` until it is closed. ignores_adapters: answers for every adapter as the base.

    length: of prompt and completion at most. port: 0 = any.
    """

    def __init__(
        self, path: str, ignores_adapters: bool = False, lora: bool = True, length: int = 4096, port: int = 0
    ) -> None:
        self.length = length
        self.plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.model: Any = None  # with adapters, once there is one
        self.adapters: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.ignores_adapters, self.lora, self.lock = ignores_adapters, lora, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(handler) -> None:
                handler.reply(*self.answer(handler.path, {}))

            def do_POST(handler) -> None:
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with self.lock:
                    handler.reply(*self.answer(handler.path, body))

            def reply(handler, status: int, answer: Any) -> None:
                text = answer if isinstance(answer, str) else json.dumps(answer)
                handler.send_response(status)
                handler.end_headers()
                handler.wfile.write(text.encode())

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/health":
            return 200, ""
        if path == "/v1/models":
            names = [{"id": BASE, "parent": None}, *({"id": name, "parent": BASE} for name in self.adapters)]
            return 200, {"object": "list", "data": names}
        if path == "/v1/load_lora_adapter" and self.lora:
            return self.load(body["lora_name"], body["lora_path"])
        if path == "/v1/unload_lora_adapter" and self.lora:
            self.adapters.remove(body["lora_name"])
            self.model.delete_adapter(body["lora_name"])
            return 200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully."
        if path == "/v1/completions":
            self.asked.append(body)
            if body["model"] not in (BASE, *self.adapters):
                return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
            if len(body["prompt"]) + body["max_tokens"] > self.length:
                return 400, {"error": {"message": f"This model's maximum context length is {self.length} tokens."}}
            return 200, self.completion(body)
        return 404, {"detail": "Not Found"}

    def load(self, name: str, path: str) -> tuple[int, Any]:
        if name in self.adapters:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        if self.model is None:
            self.model = PeftModel.from_pretrained(self.plain, path, adapter_name=name)
        else:
            self.model.load_adapter(path, adapter_name=name)
        self.model.eval()
        self.adapters.append(name)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    @torch.no_grad()
    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["top_k"] == 0 and body["top_p"] == 1.0 and body["min_p"] == 0.0 and body["logprobs"] >= 1
        draws = torch.Generator().manual_seed(body["seed"])
        prompt, ids, logprobs = body["prompt"], [], []
        for _ in range(body["max_tokens"]):
            raw = self.logits(body["model"], prompt + ids).log_softmax(-1)
            if body["temperature"] == 0:
                token = int(raw.argmax())
            else:
                token = int(torch.multinomial((raw / body["temperature"]).softmax(-1), 1, generator=draws))
            ids.append(token)
            logprobs.append(float(raw[token]))
            if token in body["stop_token_ids"]:
                break
        choice: dict[str, Any] = {"index": 0, "text": "", "logprobs": {"token_logprobs": logprobs}}
        return {"choices": [choice | ({"token_ids": ids} if body.get("return_token_ids") else {})]}

    def logits(self, name: str, ids: list[int]) -> torch.Tensor:
        tokens = torch.tensor([ids])
        if self.model is None:
            return self.plain(tokens).logits[0, -1]
        if name == BASE or self.ignores_adapters:
            with self.model.disable_adapter():
                return self.model(tokens).logits[0, -1]
        self.model.set_adapter(name)
        return self.model(tokens).logits[0, -1]


def main() -> None:
    """`vllm serve` with a second process beside it, as vLLM's engine is, that does not end by itself."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--host", choices=["127.0.0.1"], required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--max-lora-rank", type=int, choices=[1, 8, 16, 32, 64, 128, 256, 320, 512], default=16)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--dtype", choices=["auto", "float16", "bfloat16", "float32"], default="auto")
    parser.add_argument("--revision")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--disable-uvicorn-access-log", action="store_true")
    options = parser.parse_args()
    engine = subprocess.Popen(["sleep", "600"])
    names = ("HF_HUB_OFFLINE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_NO_USAGE_STATS")
    facts = vars(options) | {name: os.environ.get(name) for name in names}
    print(json.dumps(facts | {"pids": [os.getpid(), engine.pid]}), flush=True)
    lora = options.enable_lora and os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == "True"
    double = Double(options.model, lora=lora, length=options.max_model_len, port=options.port)
    load = double.load

    def loaded(name: str, path: str) -> tuple[int, Any]:
        print(f"loading {name}", flush=True)
        return load(name, path)

    double.load = loaded  # type: ignore[method-assign]
    threading.Event().wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
