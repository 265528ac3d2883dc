"""One model and many callers: threads, forked and spawned processes, data loaders, interrupts."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import lpips_fast

NETS = ("alex", "squeeze")


@pytest.fixture(scope="module", params=NETS)
def model(request: pytest.FixtureRequest) -> lpips_fast.LPIPS:
    return lpips_fast.LPIPS(net=request.param, pnet_rand=True, verbose=False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def step(model: lpips_fast.LPIPS, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    x = a.clone().requires_grad_()
    distance = model(x, b)
    distance.sum().backward()
    assert x.grad is not None
    return distance.detach(), x.grad


def pairs(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.rand(1, 3, 64, 64) * 2 - 1, torch.rand(1, 3, 64, 64) * 2 - 1)] * 1 + [
        (torch.rand(1, 3, 40 + k, 64) * 2 - 1, torch.rand(1, 3, 40 + k, 64) * 2 - 1)
        for k in range(count - 1)
    ]


def equal(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other))


def test_threads_share_a_model(model: lpips_fast.LPIPS) -> None:
    given = pairs(6)
    expected = [step(model, *pair) for pair in given]
    same: list[bool] = []

    def work() -> None:
        for pair, right in zip(given, expected):
            same.append(equal(step(model, *pair), right))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 24


# Ours is used, then the process forks; the child has the parent's bits, or says what it has.
FORKED = """
import os, sys, torch, lpips_fast
torch.set_num_threads(int(sys.argv[1]))
model = lpips_fast.LPIPS(pnet_rand=True, verbose=False)
a, b = torch.rand(4, 3, 64, 64) * 2 - 1, torch.rand(4, 3, 64, 64) * 2 - 1
def step():
    x = a.clone().requires_grad_()
    d = model(x, b)
    d.sum().backward()
    return d.detach(), x.grad
expected = step()
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)
    os._exit(0 if all(map(torch.equal, step(), expected)) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_on_one_thread_has_the_parents_bits(threads: int) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(threads)], env=environment, timeout=300
    )
    assert done.returncode == 0


def _in_a_spawned_process(
    model: lpips_fast.LPIPS, given: list[tuple[Tensor, Tensor]], queue: multiprocessing.Queue
) -> None:
    torch.set_num_threads(1)
    queue.put([model(a, b).item() for a, b in given])


def test_a_spawned_process_takes_a_model() -> None:
    model = lpips_fast.LPIPS(pnet_rand=True, verbose=False)
    given = pairs(3)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_in_a_spawned_process, args=(model, given, queue))
    process.start()
    found = queue.get(timeout=300)
    process.join(timeout=60)
    assert process.exitcode == 0
    assert found == [model(a, b).item() for a, b in given]


class Measured(Dataset):
    """A data set that holds a model: each item is a distance."""

    def __init__(self, model: lpips_fast.LPIPS, given: list[tuple[Tensor, Tensor]]) -> None:
        self.model, self.given = model, given

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.model(*self.given[index]).flatten()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_the_workers_of_a_data_loader_hold_a_model(model: lpips_fast.LPIPS) -> None:
    given = pairs(6)
    expected = torch.cat([model(a, b).detach().flatten() for a, b in given])  # used before the fork
    loader = DataLoader(
        Measured(model, given), num_workers=2, multiprocessing_context="fork", timeout=300
    )
    assert torch.equal(torch.cat([batch.flatten() for batch in loader]), expected)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers")
@pytest.mark.usefixtures("one_thread")
def test_an_interrupt_in_the_middle_leaves_the_model_as_it_was(model: lpips_fast.LPIPS) -> None:
    pair = pairs(1)[0]
    expected = step(model, *pair)
    began = time.perf_counter()
    step(model, *pair)
    took = time.perf_counter() - began
    interrupted = 0

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for k in range(20):
            try:
                signal.setitimer(signal.ITIMER_REAL, max(1e-5, took * k / 20))
                step(model, *pair)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            assert equal(step(model, *pair), expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 5
