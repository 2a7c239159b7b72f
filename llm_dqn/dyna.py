"""Learning from completions that no reward was asked for: a model of the rewards judges them.

Sutton 1991 (Dyna), https://doi.org/10.1145/122344.122377. What follows a state is known here, a token is appended; the
reward of a finished completion is all there is to model. Predicted rewards lie in the replay beside true ones and are
learned from alike.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llm_dqn.network import QNetwork
from llm_dqn.outcome_model import OutcomeModel
from llm_dqn.replay import ENDED, IMAGINED, PrefixReplay, collate_tokens
from llm_dqn.types import Episode, TokenBatch

REMEMBERED = 2048  # newest scored episodes that predictions are learned from
NEWEST = 64  # scored episodes, at least, by which it is told whether predictions still serve
TOLERATED = 2.0  # standard errors
SURE = 2.0  # standard deviations of what is predicted
LOOKS = 4  # collections over which it is smoothed what is surely predicted
ROWS = 64  # episodes whose features are computed at a time
# Of n scored episodes: features (n, D), rewards (n,), and numbers that tell their prompts apart, prompts (n,).
Known = dict[str, Tensor]


class Dyna:
    """Knows the rewards of scored episodes and predicts those of others.

    per_scored: how many episodes are to be imagined for each scored one, once `predicts`.
    """

    def __init__(self, network: QNetwork, per_scored: int) -> None:
        self.network, self.per_scored = network, per_scored
        self.model = OutcomeModel()
        self.predicts = False  # whether predictions were good enough after the last collection, and what came of them
        self.skill: float | None = None  # of the model on newest rewards, smoothed over collections
        self.best_mean: float | None = None  # reward of the best collection
        self._lows: list[float] = []  # of the last imagined collections, what is surely predicted
        self._newest = 0  # of what is known, by how many of the last it is judged
        self._read = 0  # episodes ever added to the replay, up to which all are known
        self._known: Known = {}

    def unknown(self, replay: PrefixReplay) -> Known:
        """Scored episodes that the replay has got since it was asked last, the newest of them where they are many."""
        numbers = np.arange(max(self._read, replay.added - len(replay)), replay.added)
        slots = numbers % replay.capacity
        slots = slots[replay.store.column("source")[slots] != IMAGINED][-REMEMBERED:]
        self._read = replay.added
        features, prompts = [], []
        for start in range(0, len(slots), ROWS):
            batch = replay.batch(slots[start : start + ROWS])
            ended = torch.from_numpy(replay.store.column("ended")[batch.slots.numpy()])
            features.append(self.features(batch.tokens, batch.ref_logprobs, ended))
            lengths = batch.tokens.prompt_lengths.tolist()
            ids = batch.tokens.input_ids.numpy()
            prompts += [crc32(row[:length].tobytes()) for row, length in zip(ids, lengths, strict=True)]
        if not features:
            return {}
        rewards = torch.from_numpy(replay.rewards[slots].astype(np.float32))
        return {"features": torch.cat(features), "rewards": rewards, "prompts": torch.tensor(prompts)}

    def learn(self, found: Sequence[Known], least_skill: float) -> None:
        """Fits the model to all that is known, with what every process found. least_skill: from which on it serves.

        It does as long as true rewards bear it out. Once the newest ones lie clearly below those of the best
        collection, the policy drifts towards what predictions overestimate.
        """
        fresh = [part for part in found if part]
        if not fresh:
            return
        parts = [self._known, *fresh] if self._known else fresh
        self._known = {name: torch.cat([part[name] for part in parts])[-REMEMBERED:] for name in fresh[0]}
        came = sum(len(part["rewards"]) for part in fresh)
        self._newest = min(max(came, NEWEST), len(self._known["rewards"]))
        rewards = self._known["rewards"][-self._newest :]
        self._fit()
        mean, error = float(rewards.double().mean()), float(rewards.double().std(correction=0) / len(rewards) ** 0.5)
        self.best_mean = mean if self.best_mean is None else max(mean, self.best_mean)
        self.skill = self.model.skill if self.skill is None else (self.skill + self.model.skill) / 2
        self.predicts = self.skill >= least_skill and mean >= self.best_mean - TOLERATED * error

    def _fit(self) -> None:
        self.model.fit(**{name: values.numpy() for name, values in self._known.items()}, newest=self._newest)

    def judged(self, episodes: Sequence[Episode]) -> tuple[list[Episode], np.ndarray]:
        """The episodes with predicted rewards, and how uncertain these are: (m,) standard deviations."""
        judged: list[Episode] = []
        unsure: list[np.ndarray] = []
        for start in range(0, len(episodes), ROWS):
            part = episodes[start : start + ROWS]
            tokens = collate_tokens([e.prompt_ids for e in part], [e.completion_ids for e in part])
            ref_logprobs = pad_sequence([e.ref_logprobs for e in part], batch_first=True)
            ended = torch.tensor([ENDED.index(e.ended) for e in part])
            features = self.features(tokens, ref_logprobs, ended).numpy()
            rewards = self.model.predict(features)
            judged += [replace(e, reward=float(r), source="imagined") for e, r in zip(part, rewards, strict=True)]
            unsure.append(self.model.uncertainty(features))
        return judged, np.concatenate([np.zeros(0), *unsure])

    def promise(self, reward: float, unsure: float) -> float:
        """What the policy surely earns: a mean over the last imagined collections. reward, unsure: means of what is
        predicted of the newest, and of its standard deviation.

        A policy that drifts to where predictions are too high drifts away from all that was scored, where they are
        uncertain: that falls while predictions still rise.
        """
        self._lows = [*self._lows, reward - SURE * unsure][-LOOKS:]
        return float(np.mean(self._lows))

    def features(self, tokens: TokenBatch, ref_logprobs: Tensor, ended: Tensor) -> Tensor:
        """(B, D) float32: hidden states of the base model, how likely it finds the whole and a token, length, ending.

        ref_logprobs: (B, T), 0 where masked. ended: (B,) places in `replay.ENDED`.
        """
        states = self.network.completion_states(tokens.to(self.network.device)).float().cpu()
        total, lengths = ref_logprobs.sum(1), tokens.action_mask.sum(1).float()
        return torch.cat([states, torch.stack([total, total / lengths, lengths, ended.float()], dim=1)], dim=1)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside `tensors`."""
        return {
            "predicts": self.predicts,
            "skill": self.skill,
            "best_mean": self.best_mean,
            "newest": self._newest,
            "lows": self._lows,
        }

    def tensors(self) -> dict[str, Known]:
        """What is known, the same on every process; nothing before the first rewards."""
        return {"outcomes": self._known} if self._known else {}

    def load_state(self, state: dict[str, Any], tensors: dict[str, Known], replay: PrefixReplay) -> None:
        """The reverse of `state` and `tensors`; all that the restored replay holds is known."""
        self.predicts, self.skill, self.best_mean = state["predicts"], state["skill"], state["best_mean"]
        self._newest, self._lows = state["newest"], list(state["lows"])
        self._read = replay.added
        self._known = dict(tensors.get("outcomes", {}))
        if self._known:
            self._fit()
