"""What was learned opens elsewhere: plain PEFT, where llm_dqn is not even importable, writes the same greedy tokens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm_dqn.policy import greedy
from llm_dqn.rollout import rollout
from tests.networks import lora, network, prompts, shake, writer

OPEN_ELSEWHERE = """
import json, sys
sys.modules["llm_dqn"] = None  # whoever imports it fails
import torch
from peft import AutoPeftModelForCausalLM
adapter, asked = sys.argv[1], json.loads(sys.argv[2])
model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()
rows = []
for ids in asked:
    output = model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                            max_new_tokens=8, do_sample=False)
    rows.append(output[0, len(ids):].tolist())
print(json.dumps(rows))
"""

CASES = [
    ("llama", {}),
    ("llama", {"tied": True}),
    ("gpt2", {}),
    ("gemma2", {}),
    ("gpt_neox", {}),
    ("llama", {"q_head": "linear"}),
    ("llama", {"q_head": "linear", "tied": True}),
    ("llama", {"tied": True, "lora": lora(target_modules=["q_proj", "v_proj", "lm_head"])}),
]


@pytest.mark.parametrize(("architecture", "options"), CASES, ids=lambda value: str(value)[:40])
def test_plain_peft_writes_the_same_greedy_tokens(build_model, tmp_path, architecture, options):
    """Invariant 8, first half."""
    options = dict(options)
    path = build_model(architecture, **({"tied": options.pop("tied")} if "tied" in options else {}))
    net = network(path, **options)
    shake(net, 0.3)
    asked = prompts(path)
    ours = [e.completion_ids.tolist() for e in rollout(writer(net, path), asked, greedy(), seed=0)]
    net.save_policy(tmp_path / "adapter")
    facts = json.dumps([prompt.ids for prompt in asked])
    ran = subprocess.run(
        [sys.executable, "-c", OPEN_ELSEWHERE, str(tmp_path / "adapter"), facts], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    theirs = json.loads(ran.stdout.strip().splitlines()[-1])
    assert theirs == ours
    assert ours != [e.completion_ids.tolist() for e in rollout(writer(network(path), path), asked, greedy(), seed=0)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["lm", "linear"])
def test_merged_equals_unmerged(build_model, tmp_path, kind, tied):
    """Invariant 8, second half: base + adapter and the merged model give the same logits."""
    path = build_model("llama", tied=tied)
    net = network(path, q_head=kind)
    shake(net, 0.1)
    net.save_policy(tmp_path / "adapter")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    ids = torch.tensor([prompts(path)[2].ids])
    with torch.no_grad():
        before = model(ids).logits
        after = model.merge_and_unload()(ids).logits
    assert torch.allclose(before, after, atol=1e-5)


def test_the_adapter_holds_neither_target_nor_base(tiny_llama_path, tmp_path):
    net = network(tiny_llama_path)
    net.save_policy(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert names and all("lora_" in name for name in names)
    assert {file.name for file in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "q_head.safetensors"}
    assert not (tmp_path / "adapter" / "target").exists()


def test_full_fine_tuning_leaves_a_plain_model(tiny_llama_path, tmp_path):
    net = network(tiny_llama_path, lora=None)
    shake(net, 0.05)
    asked = prompts(tiny_llama_path)
    ours = [e.completion_ids.tolist() for e in rollout(writer(net, tiny_llama_path), asked, greedy(), seed=0)]
    net.save_policy(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    for prompt, expected in zip(asked, ours, strict=True):
        ids = torch.tensor([prompt.ids])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert output[0, len(prompt.ids) :].tolist() == expected


def test_heads_come_back_equal(tiny_llama_path, tmp_path):
    net = network(tiny_llama_path)
    shake(net)
    net.save_policy(Path(tmp_path))
    again = network(tiny_llama_path, lora=str(tmp_path), target="head")
    again.load_heads(Path(tmp_path))
    for name, value in net.heads.state_dict().items():
        assert torch.equal(again.heads.state_dict()[name], value)
