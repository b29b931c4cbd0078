"""Independent pieces of work on several threads.

Two operators at once, each on one core, are faster than one after the other, each on two: they wait for each other once
in the end instead of once per operator, and each core finds its own tiles in its own cache.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def run_all(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of all tasks, in their order; as many run at once as torch has threads."""
    num_threads = torch.get_num_threads()
    num_workers = min(num_threads, len(tasks))
    if num_workers <= 1:
        return [task() for task in tasks]

    def start() -> None:
        torch.set_num_threads(num_threads // num_workers)

    def run(task: Callable[[], Result]) -> Result:
        with torch.inference_mode():
            return task()

    try:
        with ThreadPoolExecutor(num_workers, "hstu_attention", initializer=start) as pool:
            return list(pool.map(run, tasks))
    finally:
        # The number is one per thread, but threads that start later take the last one that any thread has set.
        torch.set_num_threads(num_threads)
