"""Predicting rewards in closed form: exact where it can be, honest about what it does not know."""

import numpy as np
import pytest

from llm_dqn.outcome_model import PENALTIES, OutcomeModel, _left_out

DRAW = np.random.default_rng(0)


def fitted(features: np.ndarray, rewards: np.ndarray, prompts: np.ndarray | None = None) -> OutcomeModel:
    model = OutcomeModel()
    model.fit(features, rewards, np.arange(len(rewards)) if prompts is None else prompts)
    return model


def test_a_linear_reward_is_found_though_there_are_more_features_than_episodes() -> None:
    features, slopes = DRAW.normal(size=(300, 400)), np.zeros(400)
    slopes[:5] = 1
    rewards = features @ slopes
    model = fitted(features[:200], rewards[:200])
    error = ((model.predict(features[200:]) - rewards[200:]) ** 2).mean()
    # what it says of itself is what others find
    assert model.skill == pytest.approx(1 - error / rewards[200:].var(), abs=0.15) and 0.2 < model.skill < 0.8
    few = fitted(features[:200, :20], rewards[:200])
    assert few.skill > 0.99
    assert np.abs(few.predict(features[200:, :20]) - rewards[200:]).max() < 0.5


@pytest.mark.parametrize("episodes", [64, 200])
def test_it_knows_that_it_knows_nothing(episodes: int) -> None:
    skills = [
        fitted(DRAW.normal(size=(episodes, 300)), DRAW.integers(2, size=episodes).astype(float)).skill
        for _ in range(20)
    ]
    assert np.median(skills) < 0.05 and max(skills) < 0.4
    assert fitted(DRAW.normal(size=(episodes, 3)), np.ones(episodes)).skill == 0  # nothing to explain
    assert fitted(DRAW.normal(size=(40, 3)), np.arange(40.0)).skill == 0  # too few episodes


def test_the_reward_of_a_prompt_that_came_before_is_no_skill() -> None:
    """Twenty prompts whose completions all score alike: leaving out single episodes would find them predictable."""
    prompts = np.repeat(np.arange(20), 5)
    features = DRAW.normal(size=(20, 60))[prompts] + 0.01 * DRAW.normal(size=(100, 60))
    rewards = (DRAW.random(20) < 0.5).astype(float)[prompts]
    assert fitted(features, rewards, prompts).skill < 0.3
    assert fitted(features, rewards).skill > 0.9


def test_that_a_policy_got_better_is_no_skill() -> None:
    """Early and late completions are told apart with ease; which of the late ones are good is not."""
    late = np.repeat([0.0, 1.0], 60)
    features = np.column_stack([late, DRAW.normal(size=(120, 5))])
    rewards = 0.4 + 0.5 * late + 0.02 * DRAW.normal(size=120)
    model = OutcomeModel()
    model.fit(features, rewards, np.arange(120))
    assert model.skill > 0.9
    model.fit(features, rewards, np.arange(120), newest=60)
    assert model.skill < 0.2


def test_leaving_out_in_closed_form_is_fitting_without() -> None:
    features, rewards = DRAW.normal(size=(30, 7)), DRAW.normal(size=30)
    groups = [np.arange(3), np.array([3]), *np.arange(4, 30).reshape(-1, 2)]
    centre, penalty = features.mean(0), 0.7
    scaled = features - centre
    sizes, basis = np.linalg.eigh(scaled @ scaled.T)
    sizes = sizes.clip(min=0)
    errors = _left_out(basis, sizes / (sizes + penalty), rewards - rewards.mean(), groups)
    expected = np.empty(30)
    for group in groups:
        rest = np.setdiff1d(np.arange(30), group)
        x, y = features[rest], rewards[rest]
        slopes = np.linalg.solve(
            (x - x.mean(0)).T @ (x - x.mean(0)) + penalty * np.eye(7), (x - x.mean(0)).T @ (y - y.mean())
        )
        expected[group] = (rewards[group] - y.mean() - (features[group] - x.mean(0)) @ slopes) ** 2
    assert np.allclose(errors, expected, rtol=1e-9)


def test_more_episodes_than_features_are_no_other_problem() -> None:
    """The smaller Gram matrix gives what the larger gives: a feature that is always zero changes nothing."""
    features, slopes = DRAW.normal(size=(120, 30)), DRAW.normal(size=30)
    rewards, unseen = features @ slopes + DRAW.normal(size=120), 3 * DRAW.normal(size=(40, 30))
    few = fitted(features, rewards)
    padded = fitted(np.pad(features, ((0, 0), (0, 200))), rewards)
    assert few.skill == pytest.approx(padded.skill) and 0.5 < few.skill < 1
    padding = np.pad(unseen, ((0, 0), (0, 200)))
    assert np.allclose(few.predict(unseen), padded.predict(padding))
    assert np.allclose(few.uncertainty(unseen), padded.uncertainty(padding))
    assert fitted(np.ones((120, 30)), rewards).skill == 0


def test_uncertainty_is_that_of_the_gaussian_process() -> None:
    features = DRAW.normal(size=(90, 30))
    rewards = features[:, :3].sum(1) + DRAW.normal(size=90)
    model, unseen = fitted(features, rewards), DRAW.normal(size=(7, 30))
    x, z = ((some - features.mean(0)) / features.std(0) / np.sqrt(30) for some in (features, unseen))
    prior = model._noise / model._penalty  # variance of a slope
    cross = prior * z @ x.T
    covariance = prior * z @ z.T - cross @ np.linalg.solve(prior * x @ x.T + model._noise * np.eye(90), cross.T)
    assert np.allclose(model.uncertainty(unseen), np.sqrt(np.diag(covariance)))
    assert model.uncertainty(unseen).max() < rewards.std() == pytest.approx(model.uncertainty(99 * unseen).min())
    known_nothing = fitted(DRAW.normal(size=(64, 4)), np.ones(64))
    assert not known_nothing.uncertainty(DRAW.normal(size=(5, 4))).any() and known_nothing.skill_at(0.0) == 0


@pytest.mark.parametrize(("episodes", "features"), [(400, 30), (60, 90)])
def test_uncertainty_is_as_large_as_errors_are(episodes: int, features: int) -> None:
    """Over many draws, of episodes like those that were seen and of others further away."""
    told, found, skills = [], [], []
    for _ in range(40):
        seen, unseen = DRAW.normal(size=(episodes, features)), 1.5 * DRAW.normal(size=(200, features))
        slopes = DRAW.normal(size=features) / features**0.5
        model = fitted(seen, seen @ slopes + DRAW.normal(size=episodes))
        if model.skill > 0:
            told.append(model.uncertainty(unseen).mean())
            found.append(np.sqrt(((model.predict(unseen) - unseen @ slopes) ** 2).mean()))
            skills.append([model.skill_at((model.uncertainty(unseen / 1.5) ** 2).mean()), model.skill])
    assert len(told) > 15 and 0.7 < np.mean(told) / np.mean(found) < 1.4
    # leaving out one episode after the other has told what is predicted of others that are alike
    assert np.mean(skills, axis=0)[0] == pytest.approx(np.mean(skills, axis=0)[1], abs=0.1)


def test_predictions_stay_within_the_rewards_that_were_seen() -> None:
    features = DRAW.normal(size=(100, 4))
    rewards = np.tanh(features[:, 0])
    predicted = fitted(features, rewards).predict(100 * features)
    assert predicted.min() >= rewards.min() and predicted.max() <= rewards.max() and np.ptp(predicted) > 1
    assert len(PENALTIES) > 20
