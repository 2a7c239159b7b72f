"""Finding out once, in seconds, that the Hugging Face Hub is out of reach; its libraries would try for minutes."""

import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from llm_dqn.shipped import lies_here

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?([:#].*)?")
_SECONDS = 3.0


def keep_to_cache_when_offline(names: Iterable[str], recipe_dir: str | os.PathLike[str] | None = None) -> bool:
    """Has the Hugging Face libraries open what is in their cache alone, where the Hub is out of reach; true if so.

    names: models, data and rewards as they were typed. Where all of them lie on this machine nothing is tried and no
    connection is opened. To be called before those libraries are imported: they read the setting once.
    """
    if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or getproxies():
        return False  # said already; or a proxy alone knows the way
    if not any(_may_be_on_the_hub(name) and not lies_here(name, recipe_dir) for name in names) or _reachable():
        return False
    os.environ["HF_HUB_OFFLINE"] = "1"
    return True


def _may_be_on_the_hub(name: str) -> bool:
    function = "/" not in name and "." in name  # package.module.function
    file = Path(name.partition(":")[0]).suffix in (".py", ".json", ".jsonl", ".csv", ".parquet")
    return bool(_HUB_ID.fullmatch(name)) and not function and not file


def _reachable() -> bool:
    hub = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((hub.hostname, hub.port or (80 if hub.scheme == "http" else 443)), _SECONDS).close()
    except OSError:
        return False
    return True
