"""``torchrun … pairwise``: the same bytes as one process, and an end where a process is lost."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist
from image_folders import call, make_folders, start

pytest.importorskip("PIL.Image", reason="the command line reads images with Pillow")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

RANDOM = "--random-trunk"


def torchrun(processes: int, *program: object) -> subprocess.Popen:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    return start(*program, program=launcher)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    # Several batches for each process.
    return make_folders(tmp_path, [f"{i}.png" for i in range(24)], sizes=[(72, 80)])


# Batches are small, so that every process has some, in one process and in several.
SMALL_BATCHES = """
import os, signal, sys
from lpips_fast import cli
from lpips_fast.pairs import all_pairs, trunk_share
plan = all_pairs.make_plan
def small(model, images, others, size, dtype, limit, batch, encoded):
    return plan(model, images, others, size, dtype, limit, 3, encoded)
all_pairs.make_plan = small
taps, turns = all_pairs.ImageSource.taps, []
def lost(self, positions):
    turns.append(positions)
    if os.environ.get("RANK") == "1" and len(turns) > 1:
        if sys.argv[1] == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("its disk is on fire")
    return taps(self, positions)
if sys.argv[1] != "sound":
    all_pairs.ImageSource.taps = lost
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("two", [False, True])
def test_the_same_bytes_as_one_process(
    folders: tuple[Path, Path], tmp_path: Path, two: bool
) -> None:
    script = tmp_path / "small.py"
    script.write_text(SMALL_BATCHES)
    (folders[0] / "3.png").write_bytes(b"not an image")
    compared = folders if two else folders[:1]
    arguments = ("pairwise", *compared, RANDOM, "--no-picture", "--json", "-o")
    one, many = tmp_path / "one.npy", tmp_path / "many.npy"
    single = start("sound", *arguments, one, program=(str(script),))
    out_of_one, err = single.communicate(timeout=300)
    assert single.returncode == 1, err
    process = torchrun(3, script, "sound", *arguments, many)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert one.read_bytes() == many.read_bytes()
    report = json.loads(out)  # one object: one rank speaks
    assert report == {**json.loads(out_of_one), "matrix": str(many)}
    assert err.count("3.png': not an image") == 1


@pytest.mark.parametrize("how", ["dies", "fails"])
def test_a_rank_that_is_lost_ends_all_and_nothing_is_written(
    folders: tuple[Path, Path], tmp_path: Path, how: str
) -> None:
    script, output = tmp_path / "lost.py", tmp_path / "matrix.npy"
    script.write_text(SMALL_BATCHES)
    arguments = ("pairwise", folders[0], RANDOM, "--no-picture", "-o", output)
    process = torchrun(3, script, how, *arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode != 0 and out == ""
    # Rank 0 finds it out, or torchrun ends it for what happened to rank 1.
    assert "rank 1 died" in err or "its disk is on fire" in err or "exitcode" in err, err
    assert not output.exists()


def test_what_rank_0_refuses_ends_all(tmp_path: Path) -> None:
    process = torchrun(2, "-m", "lpips_fast", "pairwise", tmp_path / "gone", RANDOM)
    out, err = process.communicate(timeout=300)
    assert process.returncode != 0 and out == ""
    errors = [line for line in err.splitlines() if line.startswith("lpips-fast: error: ")]
    assert len(errors) == 1 and "gone does not exist" in errors[0]
    assert call("pairwise", tmp_path / "gone", RANDOM) == 1
