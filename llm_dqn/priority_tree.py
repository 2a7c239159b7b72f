"""Drawing in proportion to weights that change and fade with age, in time logarithmic in their number.

Sum tree of Schaul et al. 2016, https://arxiv.org/abs/1511.05952, appendix B.2.1.
"""

import numpy as np

FLOOR = 1e-6  # added to every priority, so that none is never drawn again
HEADROOM = 512  # a weight may be this power of two times the unit before the unit grows


class PriorityTree:
    """Slots with weights (priority + 1e-6)^alpha * 2^(version / half_life), drawn in proportion to them.

    Fading by age, 2^-((newest - version) / half_life), is the same up to a factor that all weights share, and so no
    weight changes as others age. That factor is a power of two: it rounds nothing. A node is always the sum of its two
    children, so the tree follows from the weights alone, whatever the order in which they were set.
    """

    def __init__(self, priorities: np.ndarray, versions: np.ndarray, alpha: float, half_life: float) -> None:
        """Both (n,), by slot, n at least 1."""
        self.alpha, self.half_life = alpha, half_life
        self._unit = int(np.floor(versions.max() / half_life))  # weights are stored divided by 2^unit
        self._grow(len(priorities), self._weights(priorities, versions))

    @property
    def total(self) -> float:
        """Sum of all weights as they are stored. 0 when the newest went and the others are too old beside them."""
        return float(self._sums[1])

    def set(self, slots: np.ndarray, priorities: np.ndarray, versions: np.ndarray) -> None:
        """Weights of these slots, (k,) each; a slot that comes twice must come with the same."""
        if len(slots) == 0:
            return
        if slots.max() >= self._leaves:
            self._grow(int(slots.max()) + 1, self._sums[self._leaves :])
        newest = int(np.floor(versions.max() / self.half_life))
        if newest - self._unit > HEADROOM:
            older = np.ldexp(self._sums[self._leaves :], max(self._unit - newest, -5000))
            self._unit = newest
            self._grow(self._leaves, older)
        nodes = slots + self._leaves
        self._sums[nodes] = self._weights(priorities, versions)
        while nodes[0] > 1:
            nodes = nodes >> 1
            self._sums[nodes] = self._sums[2 * nodes] + self._sums[2 * nodes + 1]

    def draw(self, size: int, rng: np.random.Generator) -> np.ndarray:
        """(size,) slots, with replacement."""
        left_over = rng.random(size) * self.total
        nodes = np.ones(size, dtype=np.int64)
        while nodes[0] < self._leaves:
            left, right = self._sums[2 * nodes], self._sums[2 * nodes + 1]
            # Rounding may leave as much as the sum itself: never go where nothing is.
            goes_right = (left_over >= left) & (right > 0)
            left_over -= np.where(goes_right, left, 0.0)
            nodes = 2 * nodes + goes_right
        return nodes - self._leaves

    def _weights(self, priorities: np.ndarray, versions: np.ndarray) -> np.ndarray:
        halvings = versions / self.half_life
        whole = np.floor(halvings)
        power = np.clip(whole - self._unit, -5000, HEADROOM).astype(np.int32)
        return np.ldexp((priorities + FLOOR) ** self.alpha * np.exp2(halvings - whole), power)

    def _grow(self, count: int, weights: np.ndarray) -> None:
        """Builds the tree over these weights with room for `count`: a power of two, as leaf n is node leaves + n."""
        self._leaves = 1 << (count - 1).bit_length()
        self._sums = np.zeros(2 * self._leaves)
        self._sums[self._leaves : self._leaves + len(weights)] = weights
        width = self._leaves
        while width > 1:
            level = self._sums[width : 2 * width]
            self._sums[width // 2 : width] = level[::2] + level[1::2]
            width //= 2
