"""Stands between a run and the vLLM server that it starts, and ends the server with the run, however that ends.

    python -I vllm_guard.py PID COMMAND ...      # PID: of the run

vLLM's engine is a process of its own that outlives an API server which is killed, and keeps the GPU's memory. So the
server gets a process group, asked to stop by its head and then killed as a whole. Imports the standard library alone:
it runs apart from this package.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time

PERIOD = 0.2  # seconds between two looks at the run
LEAVING = 10.0  # seconds that the server has to end by itself


def main(run: int, command: list[str]) -> int:
    """Waits for the end of the server, of the run, or for SIGTERM; the server's exit code, as shells count."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    server = subprocess.Popen(command, start_new_session=True)
    while server.poll() is None and not asked and os.getppid() == run:
        time.sleep(PERIOD)
    end(server)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def end(server: "subprocess.Popen[bytes]") -> None:
    """Ends the server and whatever it started."""
    server.terminate()  # its head alone: the engine takes a second signal for an order to drop everything
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(LEAVING)
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
