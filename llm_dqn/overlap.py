"""Collector processes that a run starts beside itself: they write and score while it learns.

Q-learning is off-policy, so completions may be a little older than the policy that learns from them. How much older is
fixed and not left to the clock: with N collectors the k-th segment is written by the policy as it was when the learner
asked for segment k - N. A run therefore repeats bit for bit, knows its staleness, and spends its budget exactly. With
N = 1 this is the one-step off-policy scheme of Noukhovitch et al. 2024 (arXiv:2410.18252), with a replay behind it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from llm_dqn import exchange
from llm_dqn.errors import StepFailed, UserError
from llm_dqn.exchange import Order
from llm_dqn.processes import Processes
from llm_dqn.types import Episode

PERIOD = 0.02  # seconds between two looks into the folder
LEAVING = 10.0  # seconds that a collector has to end when it is no longer wanted
FOLDER = "overlap"  # in the run's
_KINDS: dict[str, type[Exception]] = {"UserError": UserError, "StepFailed": StepFailed}


def worker_name(digest: str, rank: int) -> str:
    """The name under which a segment answers an order, for one process of the learner."""
    return f"{digest[:16]}-{rank}"


def failure_file(folder: Path, rank: int, index: int) -> Path:
    """Where a collector says why it failed."""
    return folder / f"failed-{rank}-{index}.json"


class Overlap:
    """The collectors of one process of a run, and what it asked of them and has not got yet.

    count: of collectors. Several processes of a learner have as many each and the same orders, of which every process
    gets its own share of the prompts. device: of this process's network; where the machine has GPUs that no process of
    the learner uses, collectors take those in turn, otherwise they share this one.
    """

    def __init__(
        self, run: Path, count: int, processes: Processes, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self.run, self.folder, self.count = run, run / FOLDER, count
        self.processes, self.device, self.say = processes, device, say
        self.orders: dict[int, tuple[Order, str]] = {}  # number -> (what was asked for, its digest), the oldest first
        self.next = 0  # number of the next order
        self._children: list[subprocess.Popen[bytes]] = []
        self._threads = torch.get_num_threads()

    # --- starting and ending ----------------------------------------------------------------------------------------

    @contextmanager
    def running(self, at_once: Callable[[], bool]) -> Iterator[None]:
        """Collectors are there; they open the model and the rest while the learner goes on, and end with this context.

        A run that was asked to stop lets them finish what they have begun, so that --resume need not ask for it again,
        unless `at_once` says otherwise.
        """
        try:
            self._start()
            yield
            self.processes.gather(None)  # nobody reads in the folder any more
        except SystemExit:
            if not at_once():
                self._let_finish()
            raise
        finally:
            self._end_all()
        if self.processes.rank == 0:
            shutil.rmtree(self.folder)

    def _start(self) -> None:
        if self.processes.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            placed = {exchange.order_file(self.folder, number) for number in self.orders}
            for file in {*self.folder.glob("order.*"), *self.folder.glob("failed-*")} - placed:
                file.unlink()
            (self.folder / exchange.FINISHED).unlink(missing_ok=True)
        self.processes.gather(None)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        if self.device.type == "cpu":  # more threads than cores would slow everybody down
            share = max(1, self._threads // (self.count + 1))
            environment["OMP_NUM_THREADS"] = str(share)
            torch.set_num_threads(max(1, self._threads - self.count * share))
        rank, world = self.processes.rank, self.processes.world
        for index in range(self.count):
            facts = (self.run, self.folder, index, self.count, rank, world, self._device_of(index))
            with self._log(index).open("wb") as log:
                child = subprocess.Popen(
                    [sys.executable, "-m", "llm_dqn.overlap_worker", *map(str, facts)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # Ctrl-C in a terminal is the learner's to handle
                )
            self._children.append(child)
        processes = "process writes" if self.count == 1 else "processes write"
        self.say(f"{self.count} collector {processes} while the learner learns (rollout.overlap)")

    def _device_of(self, index: int) -> str:
        learners, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if self.device.type != "cuda" or gpus <= learners:
            return str(self.device)
        number = int(os.environ.get("LOCAL_RANK", "0")) * self.count + index
        return f"cuda:{learners + number % (gpus - learners)}"

    def _let_finish(self) -> None:
        (self.folder / exchange.FINISHED).touch()
        if self.orders:
            self.say("the collectors finish what they have begun; ask again to leave at once")
        for child in self._children:
            child.wait()

    def _end_all(self) -> None:
        """Closing its input ends a collector, with all that it started; `kill` is for one that does not listen."""
        for child in self._children:
            assert child.stdin is not None
            child.stdin.close()
        for child in self._children:
            try:
                child.wait(LEAVING)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._children = []
        torch.set_num_threads(self._threads)

    # --- asking and getting -----------------------------------------------------------------------------------------

    @property
    def ordered(self) -> int:
        """Completions, by this process, that were asked for and have not come yet."""
        return sum(order.completions for order, _ in self.orders.values())

    def place(self, order: Order, tensors: Mapping[str, Tensor]) -> None:
        """Asks for one more segment. tensors: the online network's."""
        online = {name: value for name, value in tensors.items() if not name.startswith("target")}
        digest = exchange.place_order(self.folder, order, online) if self.processes.rank == 0 else ""
        self.orders[order.number] = (order, self.processes.gather(digest)[0])
        self.next = order.number + 1

    def take(self) -> tuple[Order, list[Episode]]:
        """The oldest order and its episodes; waits for them. Raises what a collector failed with."""
        number, (order, digest) = next(iter(self.orders.items()))
        episodes = self.processes.agree(lambda: self._wait(worker_name(digest, self.processes.rank)))
        del self.orders[number]
        if self.processes.rank == 0:
            exchange.order_file(self.folder, number).unlink()
        return order, episodes

    def _wait(self, name: str) -> list[Episode]:
        while not (found := [s for s in exchange.segments(self.folder) if s.worker == name]):
            for index, child in enumerate(self._children):
                if child.poll() is not None:
                    self._raise(index, child.returncode)
            time.sleep(PERIOD)
        content = exchange.read_segment(found[0])
        found[0].path.unlink()
        return content.episodes

    def _raise(self, index: int, code: int) -> None:
        """What became of a collector, as the learner's own error; what was learned so far is whole."""
        who = f"collector {index} of {self.count} (rollout.overlap)"
        said = failure_file(self.folder, self.processes.rank, index)
        if said.is_file():
            facts = json.loads(said.read_text(encoding="utf-8"))
            raise _KINDS[facts["kind"]](f"{who}: {facts['message']}")
        if code < 0:
            name = signal.Signals(-code).name
            raise StepFailed(f"{who} was ended from outside by {name} (killed, or memory ran out)")
        raise StepFailed(
            f"{who} ended with exit code {code}; the end of {self._log(index)}:\n{self._last_lines(index)}"
        )

    def _log(self, index: int) -> Path:
        return self.folder / f"collector-{self.processes.rank}-{index}.log"

    def _last_lines(self, index: int) -> str:
        return "\n".join(self._log(index).read_text(encoding="utf-8", errors="replace").splitlines()[-5:])

    # --- keeping ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        """What was asked for, as plain JSON, and by how many processes; the policies beside it are `tensors`."""
        asked = [vars(order) for order, _ in self.orders.values()]
        return {"next": self.next, "orders": asked, "world": self.processes.world}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The policy of each order, by its name in a checkpoint."""
        if self.processes.rank != 0:
            return {}
        return {
            _part(number): exchange.read_order(exchange.order_file(self.folder, number))[1] for number in self.orders
        }

    def load_state(self, state: Mapping, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Asks again for what had not come. Shares of another number of processes would be other ones."""
        self.next = state["next"]
        if state["world"] != self.processes.world:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for facts in state["orders"]:
            order = Order(**facts)
            self.place(order, parts[_part(order.number)])


def _part(number: int) -> str:
    return f"order-{number:06d}"
