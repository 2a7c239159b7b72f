"""Runs what is measured in processes of its own, of one thread each."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def run_apart(*words: str) -> None:
    """`python WORDS`. Raises RuntimeError with the end of what it printed when it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    ran = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    if ran.returncode != 0:
        raise RuntimeError(ran.stdout[-2000:] + ran.stderr[-4000:])


def facts_of(*words: str) -> dict[str, Any]:
    """What `python WORDS --work FILE` leaves in the file, and the load average of the minute before it."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "facts.json"
        load = os.getloadavg()[0]
        run_apart(*words, "--work", str(output))
        return json.loads(output.read_text()) | {"load_before": load}
