"""At which prompts the policy is not to act sharply the next time."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from llm_dqn.types import Episode, Prompt

Attempt = tuple[str, bool]  # which prompt, and whether it failed


def of_prompt(ids: Sequence[int]) -> str:
    """What tells a prompt from others: a hash of its token ids."""
    return hashlib.blake2b(np.asarray(ids, np.int64).tobytes(), digest_size=8).hexdigest()


class Attempts:
    """The newest outcome of acting sharply at each prompt.

    Acting sharply again where that failed would mostly say the same again: with few prompts learning ends there.
    """

    def __init__(self, failed: Iterable[str] = ()) -> None:
        self.failed = set(failed)

    def temperatures(self, prompts: Sequence[Prompt], sharp: float) -> list[float]:
        """For each prompt `sharp`, but 1 where that failed the last time."""
        return [1.0 if of_prompt(prompt.ids) in self.failed else sharp for prompt in prompts]

    def failed_of(self, prompts: Sequence[Prompt]) -> list[str]:
        """Those of these prompts at which it failed the last time."""
        return [name for name in (of_prompt(prompt.ids) for prompt in prompts) if name in self.failed]

    @staticmethod
    def at(episodes: Iterable[Episode], least: float) -> list[Attempt]:
        """What episodes say whose reward is to be above `least`; of several for a prompt, one is enough."""
        failed: dict[str, bool] = {}
        for episode in episodes:
            prompt = of_prompt(episode.prompt_ids.tolist())
            failed[prompt] = failed.get(prompt, True) and episode.reward <= least
        return list(failed.items())

    def in_turn(self, episodes: Iterable[Episode]) -> list[Attempt]:
        """Outcomes by which every prompt that was written to sharply is not the next time, and the other way round."""
        prompts = dict.fromkeys(of_prompt(episode.prompt_ids.tolist()) for episode in episodes)
        return [(prompt, prompt not in self.failed) for prompt in prompts]

    def learn(self, attempts: Iterable[Attempt]) -> None:
        """Remembers outcomes, of all processes: prompts are dealt to another one next time."""
        for prompt, failed in attempts:
            (self.failed.add if failed else self.failed.discard)(prompt)
