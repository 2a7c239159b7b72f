"""Reward functions that another process can import."""

import os
import time


def length(completions: list[str], **columns: object) -> list[float]:
    return [float(len(completion)) for completion in completions]


def sleep_on_x(completions: list[str], **columns: object) -> list[float]:
    if "x" in completions:
        time.sleep(60)
    return [1.0] * len(completions)


def raise_on_x(completions: list[str]) -> list[float]:
    if "x" in completions:
        raise KeyError("no such judge")
    return [2.0] * len(completions)


def leave_on_x(completions: list[str]) -> list[float]:
    if "x" in completions:
        os._exit(3)
    return [3.0] * len(completions)


def process_id(completions: list[str], trainer_state: object, log_extra: object, log_metric: object) -> list[int]:
    log_extra("column", [1])
    log_metric("name", 1.0)
    return [os.getpid()] * len(completions)


def not_a_list(completions: list[str]) -> object:
    return {"reward": 1}


def array(completions: list[str]) -> object:
    import numpy

    return numpy.arange(len(completions), dtype="float32")


def count_into_log(completions: list[str], log: list[str]) -> list[float]:
    with open(log[0], "a") as file:
        file.write(f"{len(completions)} ")
    return [1.0] * len(completions)
