"""Several real processes, as torchrun starts them: one file, a rank that dies, and DDP training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import REPOSITORY
from image_folders import call, make_folders, rows_of, start

import lpips_fast
from lpips_fast.folders.ranks import Ranks

pytest.importorskip("PIL.Image", reason="the command line reads images with Pillow")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

RANDOM = "--random-trunk"


def torchrun(processes: int, *program: object) -> subprocess.Popen:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    return start(*program, program=launcher)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return make_folders(tmp_path, [f"{i}.png" for i in range(130)])


def test_alone_there_is_one_rank() -> None:
    with Ranks() as ranks:
        assert (ranks.rank, ranks.size, ranks.local_size) == (0, 1, 1)
        assert ranks.broadcast("value") == "value"
        chunks = [range(2), range(2, 3)]
        assert ranks.share(chunks) == chunks
        rows = [[lpips_fast.folders.evaluating.Row("a", (0.5,))]]
        assert list(ranks.gather(iter(rows), 1)) == rows
        assert ranks.device(torch.device("cuda")) == torch.device("cuda")
    assert not dist.is_initialized()


@pytest.mark.parametrize(("processes", "net"), [(2, "squeeze"), (3, "alex")])
def test_the_same_bytes_as_one_process(
    folders: tuple[Path, Path], tmp_path: Path, processes: int, net: str
) -> None:
    one, many = tmp_path / "one.csv", tmp_path / "many.csv"
    (folders[0] / "70.png").write_bytes(b"not an image")
    arguments = ("dirs", *folders, RANDOM, "--net", net, "-o")
    assert call(*arguments, one) == 1
    # Part of it is there already, and ends within a chunk.
    content, record = one.read_bytes(), (tmp_path / "one.csv.jsonl").read_bytes()
    many.write_bytes(content[: content.index(b"\n31.png") + 5])
    cut = record.index(b'"name": "34.png"')
    (tmp_path / "many.csv.jsonl").write_bytes(record[:cut])
    process = torchrun(processes, "-m", "lpips_fast", *arguments, many, "--json")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert json.loads(out)["results"]["distance"]["count"] == 129  # one object: one rank speaks
    assert err.count("warning: 70.png: cannot read") == 1
    assert err.count("these numbers are not LPIPS") == 1
    assert err.count("1 of 130 pairs could not be measured") == 1
    assert many.read_bytes() == content


# Rank 1 measures some chunks, and then its process is gone at once or it fails.
LOST = """
import os, signal, sys
from lpips_fast import cli
from lpips_fast.folders import evaluating
measure, measured = evaluating.Evaluation.measure, []
def measure_and_end(self, pairs):
    measured.append(len(pairs))
    if os.environ["RANK"] == "1" and len(measured) > 5:
        if sys.argv[1] == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("its disk is on fire")
    return measure(self, pairs)
evaluating.Evaluation.measure = measure_and_end
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("how", ["dies", "fails"])
def test_a_rank_that_is_lost_is_told_and_what_was_written_stays(
    folders: tuple[Path, Path], tmp_path: Path, how: str
) -> None:
    one, many = tmp_path / "one.csv", tmp_path / "many.csv"
    script = tmp_path / "lost.py"
    script.write_text(LOST)
    arguments = ("dirs", *folders, RANDOM, "--workers", 1, "-o")
    process = torchrun(2, script, how, *arguments, many)
    out, err = process.communicate(timeout=300)
    assert process.returncode != 0 and out == ""
    written = rows_of(many)
    assert 0 < len(written) < 130
    if how == "fails":
        # By itself, or by rank 0, after which torchrun may end it before it has spoken.
        assert "its disk is on fire" in err
    # Rank 0 finds the connection closed, or torchrun ends it for what happened to rank 1.
    told = (
        "lpips-fast: error: rank 1 died; ",
        "lpips-fast: error: rank 1 failed: its disk is on fire; ",
        "lpips-fast: note: stopped; ",
    )
    rest = f"{len(written)} of 130 rows are in {many}, and the same command goes on from there"
    assert any(start + rest in err for start in told), err
    assert call(*arguments, one) == 0
    assert one.read_bytes().startswith(many.read_bytes())
    assert call(*arguments, many) == 0
    assert one.read_bytes() == many.read_bytes()


def test_what_rank_0_refuses_ends_all(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    output.write_text("mine")
    process = torchrun(2, "-m", "lpips_fast", "dirs", *folders, RANDOM, "-o", output)
    out, err = process.communicate(timeout=300)
    assert process.returncode != 0 and out == ""
    errors = [line for line in err.splitlines() if line.startswith("lpips-fast: error: ")]
    assert len(errors) == 1 and "was not made by lpips-fast" in errors[0]
    assert output.read_text() == "mine"


# ------------------------------------------------------------------------------- training

TRAINING = """
import sys
import torch, torch.distributed as dist
from torch import nn
sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/folders"]
from test_ranks import Autoencoder, batch
dist.init_process_group("gloo")
rank = dist.get_rank()
model = nn.parallel.DistributedDataParallel(Autoencoder())
part = batch()[rank::dist.get_world_size()]
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    optimizer.zero_grad()
    model(part).backward()
    optimizer.step()
if rank == 0:
    torch.save({k: (p.detach(), p.grad) for k, p in model.module.named_parameters()}, sys.argv[2])
dist.barrier()
dist.destroy_process_group()
"""


class Autoencoder(torch.nn.Module):
    """A model that has its loss inside, as many training scripts do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = torch.nn.Conv2d(3, 8, 4, stride=2, padding=1)
        self.decoder = torch.nn.ConvTranspose2d(8, 3, 4, stride=2, padding=1)
        self.loss = lpips_fast.LPIPS(pnet_rand=True, verbose=False, reduction="mean")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.loss(self.decoder(self.encoder(images).relu()).tanh(), images)


def batch() -> torch.Tensor:
    return torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_gradients_under_ddp_are_those_of_one_process(tmp_path: Path) -> None:
    script, result = tmp_path / "training.py", tmp_path / "result.pt"
    script.write_text(TRAINING)
    process = torchrun(2, script, REPOSITORY / "tests", result)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    model = Autoencoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(batch()).backward()
        optimizer.step()
    together = torch.load(result, weights_only=True)
    alone = dict(model.named_parameters())
    assert together.keys() == alone.keys()
    learned = 0
    for name, (value, grad) in together.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-7)
        assert (grad is None) == (alone[name].grad is None)
        if grad is not None:
            learned += 1
            torch.testing.assert_close(grad, alone[name].grad, rtol=1e-4, atol=1e-7)
            assert grad.abs().max() > 0
    assert learned >= 4 + 5  # the autoencoder, and the linear weights of five layers


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
