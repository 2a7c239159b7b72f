import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from llm_dqn.errors import UserError
from llm_dqn.rewards import RewardModel, Rewards, load_reward
from tests import reward_examples, tiny_models

# --- names ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_rewards.py").write_text(
        "from math import sqrt\nSCALE = 2\nCALLS = []\n"
        "def concise(completions, **kw):\n    CALLS.append(1)\n    return [-SCALE * len(c) for c in completions]\n"
        "async def polite(completions, **kw):\n    return [float(len(CALLS)) for c in completions]\n"
        "def _private(completions):\n    return []\n"
    )
    return tmp_path


def test_function_of_a_file(folder: Path) -> None:
    concise = load_reward("my_rewards.py:concise", [folder / "elsewhere", folder])
    polite = load_reward(f"{folder}/my_rewards.py:polite")
    assert (concise.name, polite.name, polite.is_async) == ("concise", "polite", True)
    result = Rewards([concise, polite]).score(["p"], ["abc"])[0]
    assert result.each == {"concise": -6.0, "polite": 1.0}  # one module serves both


def test_changed_file_is_read_again(folder: Path) -> None:
    assert Rewards([load_reward("my_rewards.py:concise", [folder])]).score(["p"], ["a"])[0].total == -2.0
    path = folder / "my_rewards.py"
    path.write_text(path.read_text().replace("SCALE = 2", "SCALE = 30"))
    os.utime(path, ns=(1, 1))
    assert Rewards([load_reward("my_rewards.py:concise", [folder])]).score(["p"], ["a"])[0].total == -30.0


@pytest.mark.parametrize("spec", ["tests.reward_examples.length", "tests.reward_examples:length"])
def test_function_of_a_module(spec: str) -> None:
    assert load_reward(spec).function is reward_examples.length
    assert load_reward(load_reward(spec)).location == ("tests.reward_examples", "length")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_reward.py:concise", r"no file 'my_reward\.py'; did you mean my_rewards\.py\? \(looked in: "),
        (
            "my_rewards.py:concize",
            r"has no 'concize'; did you mean concise\? \(my_rewards\.py has: concise, polite\)",
        ),
        ("my_rewards.py", r"which function\? write 'my_rewards\.py:concise'"),
        ("my_rewards.py:SCALE", r"'SCALE' is int, not a function"),
        ("broken.py:f", r"importing .*broken\.py failed: NameError: name 'oops' is not defined"),
        ("tests.reward_examples.lenght", r"has no 'lenght'; did you mean length\?"),
        (
            "no_such_package.rewards.f",
            r"no module 'no_such_package' can be imported; a function is written 'file\.py:f",
        ),
        ("concise", r"reward 'concise': 'concise' is neither a local folder nor reachable.*'file\.py:function'"),
        ("nobody/judge", r"'nobody/judge' is neither a local folder nor reachable on the Hub"),
        ("./nowhere/judge", r"'\./nowhere/judge' is not a folder"),
    ],
)
def test_names_that_lead_nowhere(spec: str, message: str, folder: Path) -> None:
    (folder / "broken.py").write_text("oops\n")
    with pytest.raises(UserError, match=message):
        load_reward(spec, [folder])


# --- reward models ----------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}


def save_judge(folder: Path, decoder: bool = False, chat: bool = False, pad: bool = True, **config: Any) -> str:
    words = tiny_models.tokenizer(chat=chat, pad=pad)
    options = SMALL | {"vocab_size": len(words), "max_position_embeddings": 40, "initializer_range": 0.3} | config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if decoder:
            model = LlamaForSequenceClassification(LlamaConfig(**options))
        else:
            model = BertForSequenceClassification(BertConfig(**options, pad_token_id=0))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def by_hand(path: str, text: str) -> torch.Tensor:
    words, model = tiny_models.tokenizer(), AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([words(text).input_ids])).logits[0]


@pytest.mark.parametrize("decoder", [False, True])
def test_single_output_is_the_reward_whatever_the_batch(decoder: bool, tmp_path: Path) -> None:
    path = save_judge(tmp_path / "judge", decoder=decoder, num_labels=1)
    judge = load_reward(path)
    completions = [" a joy", "", " slow and pointless", " 42"]
    expected = [by_hand(path, "the film" + completion).item() for completion in completions]
    assert len({round(value, 3) for value in expected}) == 4
    judge.function.batch_size = 3
    assert judge.name == "judge"
    given = judge(prompts=["the film"] * 4, completions=completions)
    assert given == pytest.approx(expected, abs=1e-5)
    assert Rewards([path], timeout=1).score(["the film"], [" a joy"])[0].total == pytest.approx(expected[0], abs=1e-5)


def test_multi_label_output_goes_through_a_sigmoid(tmp_path: Path) -> None:
    path = save_judge(tmp_path, num_labels=1, problem_type="multi_label_classification")
    expected = by_hand(path, "the film").sigmoid().item()
    assert RewardModel(path)(["the"], [" film"]) == pytest.approx([expected], abs=1e-6)


def test_label_of_several(tmp_path: Path) -> None:
    labels = {0: "negative", 1: "neutral", 2: "positive"}
    path = save_judge(tmp_path / "judge", id2label=labels, label2id={name: index for index, name in labels.items()})
    expected = by_hand(path, "the film").softmax(-1)[2].item()
    judge = load_reward("judge#POSITIVE", [tmp_path])
    assert judge.name == "judge#POSITIVE"
    assert judge(prompts=["the"], completions=[" film"]) == pytest.approx([expected], abs=1e-6)
    with pytest.raises(
        UserError, match=r"tells 3 labels apart \(negative, neutral, positive\); name .*judge#positive'"
    ):
        load_reward(path)
    with pytest.raises(UserError, match=r"no label 'positiv'; did you mean positive\? \(labels: negative, neutral"):
        load_reward(path + "#positiv")


def test_long_texts_lose_their_start(tmp_path: Path) -> None:
    path = save_judge(tmp_path, num_labels=1)
    judge = RewardModel(path)
    assert judge.max_length == 40
    long = "the plot and the noise " * 20
    ids = tiny_models.tokenizer()(long + "the end").input_ids[-40:]
    with torch.no_grad():
        expected = judge.model(input_ids=torch.tensor([ids])).logits.item()
    assert judge([long], ["the end"]) == pytest.approx([expected], abs=1e-6)


def test_conversations_in_the_judges_own_template(tmp_path: Path) -> None:
    prompt, completion = [{"role": "user", "content": "hello"}], [{"role": "assistant", "content": "yes"}]
    plain = RewardModel(save_judge(tmp_path / "plain", num_labels=1))
    assert plain.text(prompt, completion) == "hello\nyes"
    chat = RewardModel(save_judge(tmp_path / "chat", num_labels=1, chat=True))
    assert chat.text(prompt, completion) == "<|user|>hello<eos><|assistant|>yes<eos>"
    assert Rewards([chat]).score([prompt], ["yes"])[0].total == pytest.approx(chat([prompt], [completion])[0])


def test_judge_without_padding_token(tmp_path: Path) -> None:
    judge = RewardModel(save_judge(tmp_path, decoder=True, pad=False, num_labels=1))
    together = judge(["the film", "i"], [" was a quiet joy", " hated"])
    alone = [judge(["the film"], [" was a quiet joy"])[0], judge(["i"], [" hated"])[0]]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len(judge([""], [""])) == 1


def test_judges_that_cannot_judge(tiny_llama_path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tells 2 labels apart"):
        load_reward(tiny_llama_path)
    with pytest.raises(UserError, match=r"lack 1 weights that would start at random: score\.weight"):
        load_reward(tiny_llama_path + "#LABEL_1")
    path = Path(save_judge(tmp_path / "judge", num_labels=1))
    shutil.copytree(path, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights"):
        load_reward(str(tmp_path / "pickled"))


def test_judging_leaves_no_gradient_and_no_randomness(tmp_path: Path) -> None:
    judge = RewardModel(save_judge(tmp_path, num_labels=1))
    assert not judge.model.training
    assert not any(parameter.requires_grad for parameter in judge.model.parameters())
    assert judge(["the film"], ["x"]) == judge(["the film"], ["x"])


def test_every_process_has_its_reward_model_on_its_own_gpu(monkeypatch):
    """Before Accelerate has chosen a device, "cuda" would be the first GPU for all of them."""
    from llm_dqn.reward_model import _own_device

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert _own_device() == torch.device("cuda:3")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert _own_device() == torch.device("cpu")
