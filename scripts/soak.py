"""What should never fall, at random and for as long as asked: files, signals, weights, operators.

    python scripts/soak.py --minutes 30
    python scripts/soak.py --kind weights --seed 1234       # one round again

Each round is a kind and a seed, in a process of its own that is forked here, so that a crash or a
hang is a finding like any other. It runs on one thread. A round that fails prints what happened and
the command that repeats it; at the end a table says how many rounds there were of each kind. Exit
code 1 if one failed. The checks of single operators are those of tests/kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "kernels")]

import operator_calls  # noqa: E402
import test_operator_arguments as operators  # noqa: E402
import toy_judgements as toy  # noqa: E402
from image_folders import random_pixels, write_png  # noqa: E402
from weight_files import (  # noqa: E402
    FILENAME,
    NET,
    Mirror,
    as_checkpoint,
    make_official,
    random_features,
)

import lpips_fast  # noqa: E402
from lpips_fast import cli, composed  # noqa: E402
from lpips_fast.export.exported import load_exported  # noqa: E402
from lpips_fast.export.exporters import ExportError, export_torchscript  # noqa: E402
from lpips_fast.judgements.datasets import JudgementsError, TwoAFCDataset  # noqa: E402
from lpips_fast.judgements.training import (  # noqa: E402
    Trainer,
    TrainingError,
    TrainingOptions,
    new_model,
)
from lpips_fast.weights import WeightsError, load_trunk_weights  # noqa: E402

Dice = random.Random
RANDOM_TRUNK = "--random-trunk"

# Seconds after which a round hangs, however slow the machine.
PATIENCE = 300.0


def models() -> dict[str, lpips_fast.LPIPS]:
    """Made before the first round, and shared by all."""
    return {
        net: lpips_fast.LPIPS(net=net, pnet_rand=True, verbose=False)  # type: ignore[arg-type]
        for net in ("alex", "squeeze")
    }


MODELS: dict[str, lpips_fast.LPIPS] = {}


# --------------------------------------------------------------------------------- processes


def forked(work: Callable[[], int], output: Path) -> int:
    """A process that does `work`, with what it writes in a file; returns its number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = work()
        sys.stdout.flush()
    except BaseException:
        with contextlib.suppress(BaseException):
            os.write(2, traceback.format_exc().encode("utf-8", "backslashreplace"))
    os._exit(code)


def waited(pid: int, seconds: float) -> int:
    """The process's exit code, negative for a signal; one that takes longer is killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"it hangs: no end after {seconds:.0f} s")


def command_line(*arguments: object) -> Callable[[], int]:
    def work() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return cli.main(
                [os.fsdecode(os.fspath(a)) if isinstance(a, Path) else str(a) for a in arguments]
            )
        except KeyboardInterrupt:  # before the command line is read
            return 130
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 1

    return work


def called(folder: Path, *arguments: object) -> tuple[int, str]:
    """The command line to its end: exit code and all that it wrote."""
    output = folder / f"output-{time.monotonic_ns()}.txt"
    code = waited(forked(command_line(*arguments), output), PATIENCE)
    text = output.read_text("utf-8", "replace") if output.exists() else ""
    assert "Traceback" not in text and "this is a bug" not in text, text
    assert code in (0, 1, 2, 130, 143), (code, text)
    return code, text


# ------------------------------------------------------------------------------------- the kinds


def operators_by_hand(dice: Dice, folder: Path) -> None:
    """Calls of every operator, right or damaged: refused, or as the formula in float64."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 3 * 2**30, hard))
    for name in operator_calls.CALLS:
        for _ in range(10):
            seed = dice.randrange(2**32)
            print(f"operator {name}, seed {seed}", flush=True)
            operators.check(name, operator_calls.Seeded(seed))


def _images(dice: Dice, count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(dice.randrange(2**32))
    x = torch.rand(count, 3, height, width, generator=generator) * 2 - 1
    kind = dice.randrange(4)
    if kind == 0:
        x[:] = dice.uniform(-1, 1)  # flat
    elif kind == 1:
        x = x[..., :1, :1].expand_as(x).clone()
    elif kind == 2:
        x = x.contiguous(memory_format=torch.channels_last)
    return x


def distances(dice: Dice, folder: Path) -> None:
    """Two images of any size and order: the formula's number in float64, and finite gradients."""
    net = dice.choice(sorted(MODELS))
    model = MODELS[net]
    shape = (dice.randint(1, 3), dice.randint(31, 90), dice.randint(31, 90))
    a, b = (_images(dice, *shape) for _ in range(2))
    if dice.random() < 0.2:
        b = a + 1e-3 * torch.sign(a)
    found = model(a, b)
    exact = lpips_fast.LPIPS(net=net, pnet_rand=True, verbose=False)  # type: ignore[arg-type]
    exact.load_state_dict(model.state_dict())
    exact.double()
    f0, f1 = (exact.net(exact.scaling_layer(x.double())) for x in (a, b))
    rows = [exact.layer_weight(k).double() for k in range(len(f0))]
    expected = composed.distance(f0, f1, rows, 1e-10).sum(1)
    error = (found.double().flatten() - expected.flatten()).abs().max().item()
    assert error <= 1e-5 * max(1.0, expected.abs().max().item()), error
    assert torch.equal(found, model(b, a)) and not model(a, a.clone()).any()
    a.requires_grad_()
    model(a, b).sum().backward()
    assert a.grad is not None and torch.isfinite(a.grad).all()


def _folders(dice: Dice, folder: Path, count: int) -> tuple[Path, Path]:
    generator = torch.Generator().manual_seed(dice.randrange(2**32))
    a, b = folder / "A", folder / "B"
    for k in range(count):
        size = dice.choice([(32, 32), (40, 33), (64, 48)])
        for side in (a, b):
            write_png(side / f"{k:03}.png", random_pixels(*size, generator))
    return a, b


def _spoil(dice: Dice, path: Path) -> None:
    """Something else by the name of an image."""
    content = path.read_bytes()
    path.unlink()
    kind = dice.randrange(12)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        path.symlink_to("nowhere")
    elif kind == 4:
        path.symlink_to(dice.choice(["/dev/zero", "/dev/full", "/dev/null", "/dev/tty"]))
    elif kind == 5:
        path.touch()
        os.truncate(path, dice.choice([2**20, 2**40]))
    elif kind == 6:
        before = os.getcwd()
        os.chdir(path.parent)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
        os.chdir(before)
    elif kind == 7:
        path.write_bytes(content[: dice.randrange(len(content))])
    elif kind == 8:
        path.write_bytes(dice.randbytes(dice.randrange(2000)))
    elif kind == 9:
        path.write_bytes(_damaged(dice, content))
    elif kind == 10:  # 34 bytes that declare 9000 x 9000 pixels
        body = b"VP8L\x0a\x00\x00\x00/" + (8999 | 8999 << 14).to_bytes(4, "little") + bytes(5)
        path.write_bytes(b"RIFF" + (4 + len(body)).to_bytes(4, "little") + b"WEBP" + body)
    # else: it is gone


def _damaged(dice: Dice, content: bytes) -> bytes:
    if dice.random() < 0.2:
        return content[: dice.randrange(len(content) + 1)]
    result = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 8, 64))):
        if result:
            result[dice.randrange(len(result))] = dice.randrange(256)
    return bytes(result)


def _rows(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def foreign_files(dice: Dice, folder: Path) -> None:
    """Folders in which some images are something else: the rest is measured, to the digit."""
    count = dice.randint(3, 9)
    a, b = _folders(dice, folder, count)
    code, text = called(folder, "dirs", a, b, "-o", folder / "whole.csv", RANDOM_TRUNK)
    assert code == 0, text
    spoiled = dice.sample(range(count), dice.randint(1, count - 1))
    for k in spoiled:
        _spoil(dice, dice.choice([a, b]) / f"{k:03}.png")
    options = [] if dice.random() < 0.5 else ["--workers", dice.randint(1, 4)]
    called(folder, "dirs", a, b, "-o", folder / "out.csv", RANDOM_TRUNK, *options)
    whole, rows = _rows(folder / "whole.csv"), _rows(folder / "out.csv")
    for k in range(count):
        name = f"{k:03}.png"
        if k not in spoiled:
            # Batches are other ones now, the digits are not.
            assert rows[name]["distance"] == whole[name]["distance"], rows[name]
        elif name in rows:
            assert bool(rows[name]["distance"]) != bool(rows[name]["error"]), rows[name]
    left, right = (side / f"{spoiled[0]:03}.png" for side in (a, b))
    called(folder, "pair", left, right, RANDOM_TRUNK)


def interrupted_runs(dice: Dice, folder: Path) -> None:
    """A run that is stopped at any moment, several times: the bytes of one that was not."""
    a, b = _folders(dice, folder, dice.randint(10, 60))
    whole, output = folder / "whole.csv", folder / "out.csv"
    command = ("dirs", a, b, RANDOM_TRUNK, "-o")
    began = time.monotonic()
    assert called(folder, *command, whole)[0] == 0
    took = time.monotonic() - began
    for _ in range(dice.randint(1, 4)):
        number = dice.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
        pid = forked(command_line(*command, output), folder / "stopped.txt")
        time.sleep(dice.uniform(0, took))
        os.kill(pid, number)
        stopped = time.monotonic()
        code = waited(pid, PATIENCE)
        assert code in (0, 128 + number, -number), (code, (folder / "stopped.txt").read_text())
        if number == signal.SIGTERM:
            assert time.monotonic() - stopped < 30, time.monotonic() - stopped
    code, text = called(folder, *command, output)
    assert code == 0 and output.read_bytes() == whole.read_bytes(), text


def edited_results(dice: Dice, folder: Path) -> None:
    """A CSV or record that somebody damaged: refused and left alone, or healed to the byte."""
    a, b = _folders(dice, folder, dice.randint(3, 12))
    output, record = folder / "out.csv", folder / "out.csv.jsonl"
    command = ("dirs", a, b, RANDOM_TRUNK, "-o", output)
    assert called(folder, *command)[0] == 0
    whole = output.read_bytes(), record.read_bytes()
    for _ in range(4):
        damaged = [_damaged(dice, c) if dice.random() < 0.6 else c for c in whole]
        for path, content in zip((output, record), damaged):
            path.write_bytes(content)
        code, text = called(folder, *command)
        now = output.read_bytes(), record.read_bytes()
        assert now == tuple(damaged) if code else now[0] == whole[0], (code, text, damaged, now)
        output.write_bytes(whole[0])
        record.write_bytes(whole[1])


def results_meanwhile(dice: Dice, folder: Path) -> None:
    """An output that vanishes, is replaced or filled while a run writes is an error at its end."""
    a, b = _folders(dice, folder, 40)
    output = folder / "out.csv"
    command = command_line("dirs", a, b, RANDOM_TRUNK, "-o", output)

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (dice.randrange(12_000), resource.RLIM_INFINITY))
        return command()

    how = dice.choice(["removed", "replaced", "second", "full"])
    log = folder / "first.txt"
    pid = forked(limited if how == "full" else command, log)
    while how != "full" and (not output.exists() or output.stat().st_size < 60):
        time.sleep(0.005)
        if os.waitpid(pid, os.WNOHANG)[0]:
            raise AssertionError(log.read_text())
    second = 1
    if how == "removed":
        output.unlink()
    elif how == "replaced":
        (folder / "other").write_text("mine")
        (folder / "other").replace(output)
    elif how == "second":
        second, _ = called(folder, "dirs", a, b, RANDOM_TRUNK, "-o", output, "--overwrite")
    code = waited(pid, PATIENCE)
    text = log.read_text()
    assert "Traceback" not in text and "this is a bug" not in text, text
    # It may have been faster than we were.
    if code == 0:
        assert how != "full" or len(_rows(output)) == 40, text
    else:
        assert how != "second", text
        assert f"{output}" in text.splitlines()[-1], text
    if how == "replaced":
        assert output.read_text() == "mine"
    if how == "second" and second == 0:
        assert len(_rows(output)) == 40


def weights(dice: Dice, folder: Path) -> None:
    """Damaged checkpoints: an error that names the file, or the values as they were."""
    features = random_features(torch.Generator().manual_seed(dice.randrange(2**32)))
    path = folder / dice.choice(["w.pth", "w.safetensors"])
    if path.suffix == ".pth":
        path.write_bytes(as_checkpoint(features))
    else:
        from safetensors.torch import save_file

        save_file(features, path)
    whole = path.read_bytes()
    ends = [(0, 4096), (max(0, len(whole) - 8192), len(whole)), (0, len(whole))]
    for _ in range(25):
        content = bytearray(whole)
        first, last = dice.choice(ends)
        for _ in range(dice.choice((1, 1, 2, 8))):
            content[dice.randrange(first, min(last, len(content)))] = dice.randrange(256)
        if dice.random() < 0.2:
            del content[dice.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            loaded = load_trunk_weights(NET, path)
        except WeightsError as error:
            assert str(path) in str(error) and "\n" not in str(error), error
        else:
            assert loaded.keys() == features.keys()
            assert all(torch.isfinite(tensor).all() for tensor in loaded.values())


@contextlib.contextmanager
def _hub(folder: Path, features: dict[str, Tensor]) -> Iterator[tuple[Path, bytes]]:
    """An empty hub cache, with `features` as the official weights."""
    content = as_checkpoint(features)

    class Patch:
        @staticmethod
        def setitem(table: Any, key: Any, value: Any) -> None:
            table[key] = value

    make_official(content, features, Patch())  # type: ignore[arg-type]
    settings = {"TORCH_HOME": str(folder / "torch"), "no_proxy": "127.0.0.1"}
    with mock.patch.dict(os.environ, settings):
        for name in ("LPIPS_FAST_WEIGHTS", "LPIPS_FAST_MIRROR", "LPIPS_FAST_OFFLINE"):
            os.environ.pop(name, None)
        torch.hub._hub_dir = None
        yield folder / "torch" / "hub" / "checkpoints", content


def stripped_copies(dice: Dice, folder: Path) -> None:
    """A damaged or foreign copy in the cache is never believed: the right weights, or an error."""
    features = random_features(torch.Generator().manual_seed(dice.randrange(2**32)))
    with _hub(folder, features) as (hub, content):
        os.environ["LPIPS_FAST_OFFLINE"] = "1"
        hub.mkdir(parents=True)
        (hub / FILENAME).write_bytes(content)
        load_trunk_weights(NET)
        copies = [path for path in hub.rglob("*") if path.is_file() and path.name != FILENAME]
        assert copies
        for _ in range(8):
            for path in copies:
                if path.exists() and dice.random() < 0.7:
                    path.write_bytes(_damaged(dice, path.read_bytes()))
            if dice.random() < 0.3:
                (hub / FILENAME).unlink(missing_ok=True)
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    loaded = load_trunk_weights(NET)
            except WeightsError:
                assert not (hub / FILENAME).exists()
                (hub / FILENAME).write_bytes(content)
            else:
                assert all(torch.equal(loaded[name], features[name]) for name in features)


def downloads(dice: Dice, folder: Path) -> None:
    """A server that cuts, fails, lies or adds: the official bytes, or an error and nothing left."""
    from lpips_fast.weights import download

    features = random_features(torch.Generator().manual_seed(dice.randrange(2**32)))
    download.PAUSE = 0.0
    with _hub(folder, features) as (hub, content):
        mirror = Mirror()
        try:
            given = [content, content, _damaged(dice, content), dice.randbytes(1000), b""]
            mirror.offer(dice.choice(given))
            if dice.random() < 0.1:
                mirror.files.clear()
            mirror.answers_to_cut = dice.choice([0, 0, 1, 2])
            mirror.failures = dice.choice([0, 0, 1, 2])
            mirror.says_length = dice.random() < 0.7
            mirror.extra = dice.choice([b"", b"", b"more"])
            os.environ["LPIPS_FAST_MIRROR"] = mirror.address
            try:
                loaded = load_trunk_weights(NET, progress=False)
            except WeightsError:
                assert not list(hub.rglob("*.pth*"))
            else:
                assert all(torch.equal(loaded[name], features[name]) for name in features)
        finally:
            mirror.close()


OPTIONS = TrainingOptions(epochs=2, decay_epochs=2, batch_size=4, learning_rate=1e-3)


def _trainer(items: list[toy.Item]) -> Trainer:
    model = new_model("alex", weights=MODELS["alex"].net.state_dict(), seed=0)
    return Trainer(model, items, OPTIONS, progress=False)


def training(dice: Dice, folder: Path) -> None:
    """A run that is killed and whose state is damaged: the same bits in the end, or a sentence."""
    from lpips_fast.judgements import training as module

    module._SAVE_INTERVAL = 0.0
    generator = torch.Generator().manual_seed(dice.randrange(2**32))
    items = toy.triplets(8, generator)
    for item in items:
        item["judge"] = torch.rand((), generator=generator)
    whole = _trainer(items)
    began = time.monotonic()
    whole.run(folder / "whole", curve=False)
    took = time.monotonic() - began
    run = folder / "run"
    for _ in range(dice.randint(1, 3)):
        has_state = (run / module.STATE_FILE).exists()

        def work(resume: bool = has_state) -> int:
            _trainer(items).run(run, resume=resume, curve=False)
            return 0

        pid = forked(work, folder / "run.txt")
        time.sleep(dice.uniform(0, took))
        os.kill(pid, signal.SIGKILL)
        waited(pid, PATIENCE)
    state = run / module.STATE_FILE
    if state.exists():
        content = state.read_bytes()
        for _ in range(5):
            state.write_bytes(_damaged(dice, content))
            with contextlib.suppress(TrainingError, WeightsError):
                damaged = _trainer(items)
                damaged.load_state(state)
                assert 0 <= damaged.epoch <= 4 and len(damaged.history) == damaged.epoch
                assert all(torch.isfinite(p).all() for p in damaged.model.parameters())
        state.write_bytes(content)
    last = _trainer(items)
    last.run(run, resume=state.exists(), curve=False)
    one, other = (dict(t.model.named_parameters()) for t in (whole, last))
    assert all(torch.equal(one[name], other[name]) for name in one)
    for path in (run / module.MODEL_FILE, folder / "whole" / module.MODEL_FILE):
        lpips_fast.LPIPS(net="alex", model_path=str(path), pnet_rand=True, verbose=False)


def judgements(dice: Dice, folder: Path) -> None:
    """Judgement files that are something else: an error that names the file, or a fraction."""
    generator = torch.Generator().manual_seed(dice.randrange(2**32))
    images = {part: random_pixels(64, 64, generator) for part in TwoAFCDataset.IMAGES}
    TwoAFCDataset.write(folder / "set", "0", 0.5, **images)
    path = folder / "set" / "judge" / "0.npy"
    whole = path.read_bytes()
    for _ in range(40):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        path.write_bytes(whole)
        if dice.random() < 0.5:
            path.write_bytes(_damaged(dice, whole))
        else:
            _spoil(dice, path)
        try:
            value = TwoAFCDataset(folder / "set")[0]["judge"]
        except JudgementsError as error:
            assert "\n" not in str(error) and str(folder) in str(error), error
        else:
            assert 0 <= value <= 1


def exports(dice: Dice, folder: Path) -> None:
    """An export that is killed leaves the file before it or a whole one; a damaged one is told."""
    path = folder / "m.ts"
    export_torchscript(MODELS["alex"], path)
    whole = path.read_bytes()

    def work() -> int:
        export_torchscript(MODELS["alex"], path)
        return 0

    pid = forked(work, folder / "export.txt")
    time.sleep(dice.uniform(0, 3))
    os.kill(pid, dice.choice([signal.SIGKILL, signal.SIGTERM]))
    waited(pid, PATIENCE)
    x = torch.zeros(1, 3, 64, 64)
    assert not load_exported(path)(x, x).any()
    for _ in range(3):
        content = whole[: dice.randrange(len(whole))]
        path.write_bytes(content)
        try:
            load_exported(path)
        except ExportError as error:
            assert str(path) in str(error) and "\n" not in str(error), error
        else:
            raise AssertionError(f"{len(content)} of {len(whole)} bytes were believed")


def processes(dice: Dice, folder: Path) -> None:
    """Threads, forked children and data loaders that share a model: the bits of one caller."""
    model = MODELS[dice.choice(sorted(MODELS))]
    pairs = [tuple(_images(dice, 1, 64, 64) for _ in range(2)) for _ in range(6)]
    expected = [model(a, b).detach().clone() for a, b in pairs]
    wrong: list[object] = []

    def work() -> int:
        for (a, b), right in zip(pairs, expected):
            if not torch.equal(model(a, b).detach(), right):
                wrong.append((a, b))
            x = a.clone().requires_grad_()
            model(x, b).sum().backward()
            if x.grad is None or not torch.isfinite(x.grad).all():
                wrong.append(x)
        return len(wrong)

    threads = [threading.Thread(target=work) for _ in range(dice.randint(2, 5))]
    for thread in threads:
        thread.start()
    children = [forked(work, folder / "child.txt") for _ in range(2)]
    for thread in threads:
        thread.join()
    codes = [waited(child, PATIENCE) for child in children]
    assert not wrong and codes == [0, 0], (len(wrong), codes)


def interrupts(dice: Dice, folder: Path) -> None:
    """Ctrl-C in the middle of a step: nothing but KeyboardInterrupt, and the same bits after it."""
    model = MODELS[dice.choice(sorted(MODELS))]
    a, b = (_images(dice, 2, 96, 96) for _ in range(2))
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def step() -> tuple[Tensor, Tensor]:
        x = a.clone().requires_grad_()
        d = model(x, b)
        d.sum().backward()
        assert x.grad is not None
        return d.detach(), x.grad

    expected = step()
    began = time.monotonic()
    step()
    took = time.monotonic() - began
    for _ in range(30):
        try:
            signal.setitimer(signal.ITIMER_REAL, max(1e-4, dice.uniform(0, took)))
            signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
            step()
            time.sleep(took)
        except KeyboardInterrupt:
            pass
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert all(torch.equal(x, y) for x, y in zip(step(), expected))


KINDS: dict[str, Callable[[Dice, Path], None]] = {
    work.__name__: work
    for work in (
        operators_by_hand,
        distances,
        foreign_files,
        interrupted_runs,
        edited_results,
        results_meanwhile,
        weights,
        stripped_copies,
        downloads,
        training,
        judgements,
        exports,
        processes,
        interrupts,
    )
}


# ------------------------------------------------------------------------------------- the rounds


def run_round(kind: str, seed: int) -> str:
    """What went wrong, or nothing."""
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    log = folder / "log.txt"

    def work() -> int:
        os.setpgid(0, 0)
        (folder / "files").mkdir()
        KINDS[kind](Dice(seed), folder / "files")
        return 0

    pid = forked(work, log)
    try:
        code = waited(pid, 2 * PATIENCE)
        trouble = "" if code == 0 else f"exit code {code}"
    except AssertionError as error:
        trouble = str(error)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # what it left running
    if trouble:
        text = log.read_text("utf-8", "replace") if log.exists() else ""
        trouble += "\n" + "\n".join(text.splitlines()[-40:])
    shutil.rmtree(folder, ignore_errors=True)
    return trouble


def main() -> NoReturn:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (default: 1)")
    parser.add_argument("--seed", type=int, help="of the first round (default: another each time)")
    parser.add_argument("--kind", choices=tuple(KINDS), help="of every round; with --seed one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    MODELS.update(models())
    if options.kind and options.seed is not None:
        trouble = run_round(options.kind, options.seed)
        print(trouble or "it holds")
        sys.exit(bool(trouble))

    first = random.randrange(2**32) if options.seed is None else options.seed
    print(f"soak: seed {first}", flush=True)
    choices = Dice(first)
    order = [options.kind] if options.kind else sorted(KINDS)
    counts = {kind: [0, 0, 0.0] for kind in order}
    end = time.monotonic() + 60 * options.minutes
    while time.monotonic() < end:
        choices.shuffle(order)  # each as often as another
        for kind in order:
            seed = choices.randrange(2**32)
            began = time.monotonic()
            trouble = run_round(kind, seed)
            counts[kind][0] += 1
            counts[kind][2] += time.monotonic() - began
            if trouble:
                counts[kind][1] += 1
                print(f"\nFAILED: --kind {kind} --seed {seed}: {trouble}\n", flush=True)
            if time.monotonic() > end:
                break
    print(f"{'kind':<20}{'rounds':>8}{'failed':>8}{'seconds':>9}")
    for kind in sorted(counts):
        rounds, failed, seconds = counts[kind]
        print(f"{kind:<20}{rounds:>8}{failed:>8}{seconds:>9.1f}")
    failed_rounds = sum(int(count[1]) for count in counts.values())
    print(f"{sum(int(count[0]) for count in counts.values())} rounds, {failed_rounds} failed")
    sys.exit(bool(failed_rounds))


if __name__ == "__main__":
    main()
