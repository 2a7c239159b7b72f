"""Deep Q-learning that fine-tunes a language model: a state is a prefix, an action the next token.

The public names are imported when first used, so that `import llm_dqn` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_dqn.recipe import DQNConfig
    from llm_dqn.score_files import score
    from llm_dqn.trainer import DQNTrainer

__version__ = "0.1.0"
__all__ = ["DQNConfig", "DQNTrainer", "__version__", "score"]

_HOMES = {"DQNConfig": "llm_dqn.recipe", "DQNTrainer": "llm_dqn.trainer", "score": "llm_dqn.score_files"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llm_dqn' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
