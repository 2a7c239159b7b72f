"""A loopback server that speaks the part of vLLM's HTTP interface that a run uses, on a real model and PEFT adapters.

Written from vLLM's documentation of its OpenAI-compatible server. It computes; nothing of what it answers is canned.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

BASE = "served-base"


class Double:
    """Serves the model in `path` until it is closed. ignores_adapters: answers for every adapter as the base."""

    def __init__(self, path: str, ignores_adapters: bool = False, lora: bool = True) -> None:
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

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
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
