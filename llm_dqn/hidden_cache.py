"""Hidden states of episodes under a trunk that nothing trains: computed once, looked up at every update after.

Where only an output layer is tuned, online network, target network and reference read the same hidden states, and no
update changes them. What is left of an update is the head.

B episodes, L padded length, H hidden size.
"""

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor

from llm_dqn.types import TokenBatch


class HiddenCache:
    """Hidden states by token ids, in main memory; those that were not asked for longest go first.

    limit: bytes that ids and states may take together.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._rows: OrderedDict[bytes, Tensor] = OrderedDict()
        self._asked = self._found = 0  # since `hit_share`

    def __len__(self) -> int:
        return len(self._rows)

    def hidden(self, tokens: TokenBatch, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, L, H) on the device of the ids, from each prompt's last token on; zero before it and in the padding.

        compute: ids (1, n) -> states (1, n, H) by the trunk. It is asked for one episode at a time, without padding, so
        that nothing depends on the rest of a batch or on what was asked before: a resumed run begins with nothing here
        and repeats bit for bit.
        """
        ids, device = tokens.input_ids.cpu(), tokens.input_ids.device
        places = zip(tokens.prompt_lengths.tolist(), tokens.attention_mask.sum(1).tolist(), strict=True)
        rows = []
        for row, (prompt, length) in enumerate(places):
            first = prompt - 1
            rows.append((first, self._row(ids[row, :length], first, lambda ids: compute(ids.to(device)))))
        hidden = rows[0][1].new_zeros(*ids.shape, rows[0][1].shape[-1])
        for row, (first, states) in enumerate(rows):
            hidden[row, first : first + len(states)] = states
        return hidden.to(device)

    def _row(self, ids: Tensor, first: int, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """(n - first, H) of one episode's ids (n,)."""
        key = first.to_bytes(8, "little") + ids.numpy().tobytes()
        self._asked += 1
        if key in self._rows:
            self._found += 1
            self._rows.move_to_end(key)
            return self._rows[key]
        states = compute(ids.unsqueeze(0))[0, first:].detach().to("cpu", copy=True)
        size = _bytes(key, states)
        if size <= self.limit:
            while self.held + size > self.limit:
                self.held -= _bytes(*self._rows.popitem(last=False))
            self._rows[key] = states
            self.held += size
        return states

    def hit_share(self) -> float:
        """Share of the episodes asked for since this was last asked whose states were here."""
        share = self._found / max(self._asked, 1)
        self._asked = self._found = 0
        return share


def _bytes(key: bytes, states: Tensor) -> int:
    return len(key) + states.nbytes
