"""Bytes that a replay memory of 200 rows keeps alive after 20 tasks of 10 000 rows of 784 floats, and its times.

``bytes_reported`` is what the part says, ``tensor_bytes_alive`` what the process holds more than before in tensors
(found by walking over all of them), ``python_bytes_alive`` what ``tracemalloc`` counts beside. Times in microseconds:
offering 10 000 rows to an empty memory and to a full one, offering a batch of 128 to a full one, and joining 128
replayed rows to a batch of 128 against a bare ``index_select`` and ``cat`` of the same columns, alternating in one run.
"""

from __future__ import annotations

import gc
import statistics
import sys
import tracemalloc
import warnings

import torch
from torch import Tensor, nn

from continual.models.output import Output
from continual.parts.context import TrainingContext
from continual.parts.replay.rehearsal import Rehearsal
from continual.streams.experience import Experience
from continual.table import Batch, TensorTable

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from bench import alternate, timed, write

CAPACITY, TASKS, TASK_ROWS, WIDTH, BATCH = 200, 20, 10_000, 784, 128
REPEATS, CALLS, THREADS, SEED = 15, 200, 1, 0
TARGET_BYTES = 700_000


def task(index: int, generator: torch.Generator, rows: int = TASK_ROWS) -> Experience:
    table = TensorTable(
        {
            "inputs": torch.rand(rows, WIDTH, generator=generator),
            "labels": torch.randint(0, 10, (rows,), generator=generator),
            "row": torch.arange(index * rows, (index + 1) * rows),
        }
    )
    return Experience(index, f"task {index}", table, scenario="domain")


def loop(**settings: str | int) -> tuple[TrainingContext, Rehearsal]:
    part = Rehearsal(capacity=CAPACITY, **settings)
    return TrainingContext(nn.Identity(), [part], seed=SEED, batch_size=BATCH), part


def tensor_bytes_alive() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storages = [found.untyped_storage() for found in gc.get_objects() if isinstance(found, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def bytes_after_all_tasks(select: str) -> dict[str, int | float]:
    generator = torch.Generator().manual_seed(SEED)
    before = tensor_bytes_alive()
    tracemalloc.start()
    context, part = loop(select=select)
    batch: Batch = {}
    for index in range(TASKS):
        experience = task(index, generator)
        part.begin(context, experience)
        context.experience_index, context.current_rows = index, BATCH
        for _ in range(3):
            batch = part.extend(experience.train[torch.arange(BATCH)])
        part.end(context, experience)
    del experience, batch
    alive = tensor_bytes_alive() - before
    python = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return {
        "bytes_reported": part.nbytes(),
        "tensor_bytes_alive": alive,
        "python_bytes_alive": python,
        "within_target": part.nbytes() <= alive + 1024 and alive + python <= TARGET_BYTES,
        "bytes_of_the_data": TASKS * TASK_ROWS * (WIDTH * 4 + 16),
    }


def seconds(select: str) -> dict[str, float]:
    generator = torch.Generator().manual_seed(SEED)
    first, second = task(0, generator), task(1, generator)
    full_context, full = loop(select=select)
    full.end(full_context, first)
    full_state = full.state_dict()
    step_context, step = loop(select=select, insert="step")
    batches = [second.train[torch.arange(start, start + BATCH)] for start in range(0, CALLS * BATCH // 4, BATCH)]
    full_context.experience_index, full_context.current_rows = 1, BATCH
    step_context.current_rows = BATCH
    nothing = Output(torch.zeros(0))
    columns = full.memory.batch(torch.arange(CAPACITY))
    index_B = torch.randperm(CAPACITY, generator=generator)[:BATCH]

    def offer_to_empty() -> None:
        context, part = loop(select=select)
        part.end(context, first)

    def offer_to_full() -> None:
        full.load_state_dict(full_state)
        full.end(full_context, second)

    def offer_by_step() -> None:
        step.load_state_dict(full_state)
        for batch in batches:
            step.after_step(batch, nothing)

    def join() -> None:
        for _ in range(CALLS):
            full.extend(batches[0])

    def join_bare() -> None:
        for _ in range(CALLS):
            {name: torch.cat([batches[0][name], columns[name].index_select(0, index_B)]) for name in columns}

    work = {
        "offer 10 000 rows to an empty memory": timed(offer_to_empty),
        "offer 10 000 rows to a full memory": timed(offer_to_full),
        "offer 128 rows by step": timed(offer_by_step),
        "join 128 rows": timed(join),
        "join 128 rows, bare": timed(join_bare),
    }
    calls = {"offer 128 rows by step": len(batches), "join 128 rows": CALLS, "join 128 rows, bare": CALLS}
    figures = alternate(work, REPEATS)
    return {name: statistics.median(rounds) / calls.get(name, 1) * 1e6 for name, rounds in figures.items()}


def main() -> None:
    torch.set_num_threads(THREADS)
    write(
        {
            "seed": SEED,
            "threads": THREADS,
            "target_bytes": TARGET_BYTES,
            "bytes": {select: bytes_after_all_tasks(select) for select in ("reservoir", "class-balanced")},
            "microseconds": {select: seconds(select) for select in ("reservoir", "class-balanced")},
        },
        "Bytes and times of the replay memory.",
    )


if __name__ == "__main__":
    main()
