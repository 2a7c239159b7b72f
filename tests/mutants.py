"""Do the tests notice? Flips one sign, index or mask at a time in a copy of the package and runs the tests on it.

python -m tests.mutants            # a line a mutant: caught by which test, or SURVIVED; exit 1 if any survived
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FAST = [
    "targets",
    "losses",
    "replay",
    "replay_properties",
    "checkpoint",
    "network",
    "speed",
    "rollout",
    "trainer",
    "evaluation",
    "learning",
]

# (file, what stands there, what a slip of the pen would make of it)
MUTANTS = [
    ("targets", "returns[:, t + 1] - advantages[:, t + 1]", "returns[:, t + 1] + advantages[:, t + 1]"),
    ("targets", "best = _within(q_online, support)", "best = _within(q_target, support)"),
    ("targets", "(1 - lam) * next_values[:, t] + lam * following", "lam * next_values[:, t] + (1 - lam) * following"),
    ("targets", "torch.logsumexp(log_prior + q_values / beta", "torch.logsumexp(log_prior + q_values * beta"),
    ("targets", "return torch.where(goes_on, shifted, next_values)", "return shifted"),
    ("losses", "return -weighted /", "return weighted /"),
    ("losses", "torch.where(mask, values, 0.0).sum()", "values.sum()"),
    ("losses", "weights * policy_error, mask, count) / beta", "weights * policy_error, mask, count) * beta"),
    ("losses", "(now.detach() - written).exp()", "(written - now.detach()).exp()"),
    ("losses", "torch.where(error < 0, 1 - expectile, expectile)", "torch.where(error > 0, 1 - expectile, expectile)"),
    ("states", "return _pick(hidden, tokens.prompt_lengths - 1, tokens.action_mask)",
     "return _pick(hidden, tokens.prompt_lengths, tokens.action_mask)"),
    ("states", "values[:, 1:] * tokens.action_mask", "values[:, :-1] * tokens.action_mask"),
    ("network", "(states.detach()), mask)", "(states), mask)"),
    ("network", "QOutput(values + self.beta * (logprobs - batch.ref_logprobs)",
     "QOutput(values - self.beta * (logprobs - batch.ref_logprobs)"),
    ("vocabulary", "shrink = (highest - higher).exp_()", "shrink = torch.ones_like(higher)"),
    ("vocabulary", "push - pull)", "push)"),
    ("policy_network", "(logits)[..., : self.num_tokens].float()", "(logits).float()"),
    ("replay", "goes_on = (ended == ENDED.index(\"length\"))", "goes_on = (ended == ENDED.index(\"eos\"))"),
    ("replay", "rewards[last] = facts[\"rewards\"]", "rewards[:, 0] = facts[\"rewards\"]"),
    ("replay", "usable &= self.store.numbers(places) < drawn_at", "usable &= self.store.numbers(places) <= drawn_at"),
    ("episode_store", "(self.added - 1 - slots)", "(self.added - slots)"),
    ("episode_store", "slots[-self.capacity :]:", "slots[: self.capacity]:"),
    ("replay", "rewards > rewards.mean() + 1e-9", "rewards < rewards.mean() - 1e-9"),
    ("saver", "known and _same_memory(known[0], tensors) and", "known and"),
    ("checkpoint", "if good is not None and good not in kept", "if False"),
    ("rollout", "return ids[: position + 1]", "return ids[:position]"),
    ("rollout", "input_ids[row, longest - len(prompt.ids) :]", "input_ids[row, : len(prompt.ids)]"),
    ("policy", "scores[:, self.num_tokens :] = float(\"-inf\")", "pass"),
    ("trainer", "(returns - q.values) * batch.action_mask", "(q.values - returns) * batch.action_mask"),
    ("trainer", "self.network.sync_target(self.args.target_tau)", "pass"),
    ("learner", "if usable & norm.isfinite():", "if usable:"),
    ("learner", "all_finite(losses_here) & (count > 0)", "count > 0"),
    ("objective", "loss + self.advantage_weight * policy_loss", "loss - self.advantage_weight * policy_loss"),
    ("evaluation", "float(t.reward > b.reward)", "float(t.reward < b.reward)"),
]  # fmt: skip


def caught_by(file: str, found: str, flipped: str) -> str | None:
    """The first test that fails on the mutant, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("llm_dqn", "tests", "recipes"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "data").symlink_to(ROOT / "data")
        shutil.copy(ROOT / "pyproject.toml", copy)
        source = copy / "llm_dqn" / f"{file}.py"
        text = source.read_text()
        if text.count(found) != 1:
            raise SystemExit(f"{file}.py: expected once, found {text.count(found)} times: {found}")
        source.write_text(text.replace(found, flipped))
        tests = [f"tests/test_{name}.py" for name in sorted(FAST, key=lambda name: name != file)]
        tests += ["tests/test_processes.py", "tests/faults/test_numerics.py"] if file in ("trainer", "learner") else []
        command = [sys.executable, "-m", "pytest", "-x", "-rfE", "-p", "no:cacheprovider", *tests]
        ran = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=_environment(copy))
        failed = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if ran.returncode not in (0, 1):
            raise SystemExit(f"the tests could not be run: {ran.stdout[-1000:]}{ran.stderr[-1000:]}")
        return failed[0].split(" - ")[0] if ran.returncode else None


def _environment(copy: Path) -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}


def main() -> None:
    survived = 0
    for file, found, flipped in MUTANTS:
        test = caught_by(file, found, flipped)
        survived += test is None
        print(f"{'SURVIVED' if test is None else 'caught  '} {file}: {flipped}   {test or ''}", flush=True)
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
