"""The emulation's race detector: it sees every planted fault, and nothing where there is none.

The kernels are those of tests/emulation/run_planted_faults.cpp, each with a twin without the fault.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from cuda_emulation import THREAD_ORDERS, EmulatedLibrary, emulation_library

BLOCKS, THREADS = 3, 64
FAULTS = {
    "take_from_neighbour": "another wrote (shared memory)|another read (shared memory)",
    "use_buffer_twice": "another wrote (shared memory)|another read (shared memory)",
    "order_by_shuffle": "another wrote (shared memory)",
    "write_the_same": "two threads write one place (global memory)",
    "read_other_blocks": "another wrote (global memory)|another read (global memory)",
    "write_what_a_block_read": "another wrote (global memory)|another read (global memory)",
    "read_before_writing": "read before it is written (shared memory)",
    "keep_shared_memory": "read before it is written (shared memory)",
    "read_cache_of_written": "goes through the read-only cache (global memory)",
}
# Where going on makes no sense, the launch ends.
ENDS = {
    "store_vector": "a misaligned access",
    "load_vector": "a misaligned access",
    "some_miss_the_barrier": "some threads end while others are at a barrier",
    "some_miss_the_shuffle": "misses some of its lanes|in different shuffles",
    "different_shuffles": "in different shuffles",
}


@pytest.fixture(scope="module")
def library() -> EmulatedLibrary:
    return EmulatedLibrary(emulation_library("run_planted_faults"))


@pytest.fixture
def planted(library: EmulatedLibrary) -> Iterator[EmulatedLibrary]:
    library.races()
    yield library
    library.release()
    library.races()


def run(library: EmulatedLibrary, name: str, faultless: bool, order: int) -> str | None:
    """What ended the launch, if anything did."""
    values = library.empty((BLOCKS * THREADS,), torch.float32).fill_(1)
    pointer = ctypes.c_void_p(values.data_ptr())
    ended = library.library.run_planted(name.encode(), faultless, pointer, BLOCKS, order)
    return library.library.last_error().decode() if ended else None


def test_every_planted_fault_is_expected(library):
    library.library.planted_faults.restype = ctypes.c_char_p
    assert set(library.library.planted_faults().decode().split()) == {*FAULTS, *ENDS}


@pytest.mark.parametrize("order", THREAD_ORDERS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen_in_any_order(planted, name, order):
    assert run(planted, name, False, order) is None
    reports = planted.races()
    assert reports and all(report.startswith(f"{name}<false>: ") for report in reports)
    assert any(wanted in report for wanted in FAULTS[name].split("|") for report in reports)


@pytest.mark.parametrize("name", ENDS)
def test_a_fault_ends_the_launch(planted, name):
    ended = run(planted, name, False, 0)
    assert ended is not None and any(text in ended for text in ENDS[name].split("|"))
    assert run(planted, name, True, 0) is None  # and the next one runs


@pytest.mark.parametrize("order", THREAD_ORDERS)
@pytest.mark.parametrize("name", [*FAULTS, *ENDS])
def test_no_fault_no_report(planted, name, order):
    assert run(planted, name, True, order) is None
    assert planted.races() == []


def test_reports_name_the_thread_and_are_not_repeated(planted):
    for _ in range(3):
        run(planted, "write_the_same", False, 0)
    (report,) = planted.races()
    assert report == (
        "write_the_same<false>: race: two threads write one place (global memory), "
        "first thread 1 of block 0"
    )
    assert planted.races() == []
