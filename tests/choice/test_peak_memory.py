from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lpips_fast.choice import peak_memory
from lpips_fast.choice.peak_memory import added_at_peak, can_measure

CPU = torch.device("cpu")
MIB = 2**20

needs_linux = pytest.mark.skipif(not can_measure(CPU), reason="memory is not told on this system")


@needs_linux
@pytest.mark.usefixtures("usual_allocator")
def test_the_peak_counts_and_not_the_end(run_python: Any) -> None:
    report = run_python(
        """
        import torch
        from lpips_fast.choice.peak_memory import added_at_peak

        cpu = torch.device("cpu")
        mebibyte = lambda n: torch.ones(n * 2**18)
        mebibyte(50)  # a peak before the call does not count
        def call():
            mebibyte(20)
            mebibyte(5)
        print(added_at_peak(call, cpu), added_at_peak(lambda: None, cpu))
        """,
        **peak_memory.ENVIRONMENT,
    )
    taken, nothing = (int(text) / MIB for text in report.split())
    assert 19 < taken < 25  # Linux counts pages in batches, and may miss one
    assert 0 <= nothing < 1


@pytest.mark.cuda
def test_cuda() -> None:
    device = torch.device("cuda")
    assert can_measure(device)
    taken = added_at_peak(lambda: torch.ones(2**18, device=device), device)
    assert MIB <= taken < 4 * MIB


def test_systems_that_do_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "_PROCESS", tmp_path / "none")
    assert not can_measure(CPU)
    with pytest.raises(OSError, match="none"):
        added_at_peak(lambda: None, CPU)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "status").write_text("Name:\tpython\nVmHWM:\t  12 kB\n")
    assert peak_memory._bytes("VmHWM") == 12 * 1024
    with pytest.raises(OSError, match="has no VmRSS"):
        added_at_peak(lambda: None, CPU)
    assert not can_measure(torch.device("meta"))
