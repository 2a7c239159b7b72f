"""What a finished completion would score, told from what the untouched base model makes of it: ridge regression.

n episodes with known rewards, D features. Closed form, so it is fitted anew whenever rewards come in and has nothing
to tune: the penalty is chosen by leaving out one prompt after the other.
"""

import numpy as np

PENALTIES = np.logspace(-5, 2, 29)  # times the largest eigenvalue of the Gram matrix
MOST_FREEDOM = 0.8  # degrees of freedom an episode: what fits everything tells nothing when something is left out
FEWEST, FEWEST_PROMPTS = 48, 16  # episodes and prompts without which nothing is learned


class OutcomeModel:
    """Predicts rewards from features. `skill` is 0 until it is fitted, and where it knows nothing."""

    def __init__(self) -> None:
        self.skill = 0.0  # share of the newest rewards' variance that it explains where it has not seen the prompt

    def fit(self, features: np.ndarray, rewards: np.ndarray, prompts: np.ndarray, newest: int | None = None) -> None:
        """Learns from (n, D) features, (n,) rewards and (n,) numbers that tell prompts apart; forgets what it learned
        before. newest: of how many of the last ones `skill` tells; None: of all.

        That a policy is better than it was is easily predicted and of no use: among what it writes now, the good must
        be told from the bad. With the smaller of two Gram matrices, neither n nor D alone makes it slow. Hoerl &
        Kennard 1970, https://doi.org/10.2307/1267351.
        """
        rewards, features = np.asarray(rewards, dtype=np.float64), np.asarray(features, dtype=np.float64)
        self.skill, self._range = 0.0, (float(rewards.min()), float(rewards.max()))
        varies = features.std(0) > 1e-6
        self._scale = np.where(varies, features.std(0), np.inf) * np.sqrt(features.shape[1])
        self._mean, self._center, self._slopes = rewards.mean(), features.mean(0), np.zeros(features.shape[1])
        groups = [np.flatnonzero(prompts == prompt) for prompt in np.unique(prompts)]
        if len(rewards) < FEWEST or len(groups) < FEWEST_PROMPTS or rewards.var() <= 0:
            return
        scaled, centred = (features - self._center) / self._scale, rewards - self._mean
        sizes, basis = _spectrum(scaled)
        penalties = PENALTIES * max(sizes.max(initial=0), 1e-9)
        penalties = penalties[[(sizes / (sizes + one)).sum() <= MOST_FREEDOM * len(rewards) for one in penalties]]
        errors = [_left_out(basis, sizes / (sizes + penalty), centred, groups) for penalty in penalties]
        best = int(np.argmin([error.mean() for error in errors]))
        last = slice(None if newest is None else -newest, None)
        spread = rewards[last].var()
        if errors[best].mean() < rewards.var() and errors[best][last].mean() < spread:
            self.skill = float(1 - errors[best][last].mean() / spread)
            self._penalty, self._sizes = penalties[best], sizes
            own = (basis**2 @ (sizes / (sizes + self._penalty))).clip(max=1 - 1e-9)
            # an error at what is left out is 1 / (1 - own) times noise, own / (1 - own) of it from not knowing better
            self._noise = (errors[best] * (1 - own)).mean()
            self._variances = rewards.var(), self._noise * (own / (1 - own)).mean()
            self._axes = scaled.T @ basis
            self._slopes = self._axes @ ((basis.T @ centred) / (sizes + self._penalty))

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(m,) expected rewards of (m, D) features, within the range of those that were seen."""
        return (self._mean + self._scaled(features) @ self._slopes).clip(*self._range)

    def uncertainty(self, features: np.ndarray) -> np.ndarray:
        """(m,) standard deviation of what is predicted of (m, D) features, 0 where nothing was learned.

        The further from all that was seen, the larger, up to that of the rewards; what a reward scatters about its
        expectation is not in it. Ridge regression as a Gaussian process: Rasmussen & Williams 2006, eq. 2.11,
        https://gaussianprocess.org/gpml.
        """
        if self.skill == 0:
            return np.zeros(len(features))
        scaled = self._scaled(features)
        known = (scaled @ self._axes) ** 2 / (self._sizes + self._penalty)
        variance = ((scaled**2).sum(1) - known.sum(1)).clip(min=0) * self._noise / self._penalty
        return np.sqrt(variance.clip(max=self._variances[0]))

    def skill_at(self, variance: float) -> float:
        """What `skill` would be of completions of which predictions are as uncertain as this, on average.

        variance: mean square of `uncertainty`. It says whether a log of what others wrote tells of what this policy
        writes. Below 0 where they have little in common.
        """
        if self.skill == 0:
            return 0.0
        spread, usual = self._variances
        return self.skill - (variance - usual) / spread

    def _scaled(self, features: np.ndarray) -> np.ndarray:
        return (np.asarray(features, dtype=np.float64) - self._center) / self._scale


def _spectrum(scaled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(eigenvalues (k,), eigenvectors (n, k)) of the (n, n) Gram matrix of n rows of D features, k = min(n, D)."""
    if len(scaled) <= scaled.shape[1]:
        sizes, basis = np.linalg.eigh(scaled @ scaled.T)
        return sizes.clip(min=0), basis
    sizes, axes = np.linalg.eigh(scaled.T @ scaled)
    found = sizes > 1e-12 * sizes.max()  # along the others nothing varies
    return sizes[found], scaled @ axes[:, found] / np.sqrt(sizes[found])


def _left_out(basis: np.ndarray, kept: np.ndarray, rewards: np.ndarray, groups: list[np.ndarray]) -> np.ndarray:
    """(n,) squared error at each group's episodes of a fit to all others: (I - H_gg)^-1 times their residuals, H the
    hat matrix with the mean in it. Allen 1974 (PRESS), https://doi.org/10.1080/00401706.1974.10489157, by groups.

    A prompt that came before says much about the reward and nothing about which of its completions is good.
    """
    weighted, mean = basis * kept, 1 / len(rewards)
    left = rewards - weighted @ (basis.T @ rewards)
    errors = np.empty(len(rewards))
    for group in groups:
        if len(group) == 1:
            own = float(weighted[group[0]] @ basis[group[0]]) + mean
            errors[group] = left[group] / max(1 - own, 1e-9)
        else:
            own = np.eye(len(group)) - weighted[group] @ basis[group].T - mean
            errors[group] = np.linalg.lstsq(own, left[group], rcond=None)[0]
    return errors**2
