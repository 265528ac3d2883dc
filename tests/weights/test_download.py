"""The download, from a server on this machine that behaves and one that does not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
from torch import Tensor
from weight_files import (
    FILENAME,
    NET,
    Mirror,
    assert_nothing_partial,
    assert_same,
    place,
    stripped_path,
)

from lpips_fast.trunk import feature_shapes
from lpips_fast.weights import TRUNK_SOURCES, WeightsNotFoundError, download, load_trunk_weights
from lpips_fast.weights.linear import PACKAGED

pytestmark = pytest.mark.usefixtures("hub")


@pytest.mark.parametrize("slash", ["", "/"])
def test_download(
    slash: str,
    hub: Path,
    mirror: Mirror,
    official: bytes,
    features: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LPIPS_FAST_MIRROR", mirror.address + slash)
    mirror.offer(official)
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    assert_same(load_trunk_weights(NET), features)
    assert (hub / FILENAME).read_bytes() == official
    assert_nothing_partial(hub)
    shown = capsys.readouterr()
    assert f"Downloading {mirror.address}/{FILENAME}" in shown.err and "100%" in shown.err
    assert shown.out == ""
    assert_same(load_trunk_weights(NET), features)
    assert mirror.requests == [f"/models/{FILENAME}"]


def test_download_without_progress_is_silent(
    mirror: Mirror, official: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror.offer(official)
    load_trunk_weights(NET, progress=False)
    assert capsys.readouterr() == ("", "")


def test_download_with_the_wrong_hash(hub: Path, mirror: Mirror, official: bytes) -> None:
    mirror.offer(official.replace(b"classifier", b"klassifier"))
    with pytest.raises(WeightsNotFoundError, match="the server sent another file: its SHA-256 is"):
        load_trunk_weights(NET, progress=False)
    assert list(hub.rglob("*")) == []
    assert len(mirror.requests) == 2  # it might have been the line


@pytest.mark.parametrize("fault", ["cut", "cut without a length", "error 503"])
def test_a_failed_download_is_tried_once_more(
    fault: str, hub: Path, mirror: Mirror, official: bytes, features: dict[str, Tensor]
) -> None:
    mirror.offer(official)

    def fail(times: int) -> None:
        mirror.requests.clear()
        mirror.says_length = fault != "cut without a length"
        mirror.answers_to_cut = 0 if fault == "error 503" else times
        mirror.failures = times if fault == "error 503" else 0

    fail(2)
    with pytest.raises(WeightsNotFoundError, match=r"the download from http.* failed: ") as error:
        load_trunk_weights(NET, progress=False)
    assert ("503" if fault == "error 503" else "broke off after") in str(error.value)
    assert list(hub.rglob("*")) == [] and len(mirror.requests) == 2
    fail(1)
    assert_same(load_trunk_weights(NET, progress=False), features)
    assert_nothing_partial(hub)
    assert len(mirror.requests) == 2


@pytest.mark.parametrize("says_length", [True, False])
def test_a_larger_file_is_not_fetched(
    says_length: bool, hub: Path, mirror: Mirror, official: bytes
) -> None:
    mirror.offer(official + bytes(50_000_000))
    mirror.says_length = says_length
    with pytest.raises(WeightsNotFoundError, match="the server sends another file, of"):
        load_trunk_weights(NET, progress=False)
    assert list(hub.rglob("*")) == [] and len(mirror.requests) == 1


def test_server_without_the_file(hub: Path, mirror: Mirror) -> None:
    with pytest.raises(WeightsNotFoundError, match="the server answered 404"):
        load_trunk_weights(NET, progress=False)
    assert list(hub.rglob("*")) == [] and len(mirror.requests) == 1


def test_server_that_cannot_be_reached(
    hub: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as deaf:  # it holds a port but does not listen: connections are refused
        deaf.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        monkeypatch.setenv("LPIPS_FAST_MIRROR", address)
        with pytest.raises(WeightsNotFoundError) as error:
            load_trunk_weights(NET, progress=False)
    message = str(error.value)
    assert "refused" in message and address in message
    assert_says_what_to_do(message, hub)
    monkeypatch.setenv("LPIPS_FAST_MIRROR", "no address at all")
    with pytest.raises(
        WeightsNotFoundError, match="LPIPS_FAST_MIRROR is an address of an unknown type"
    ):
        load_trunk_weights(NET, progress=False)


@pytest.mark.parametrize("value", ["1", "true"])
def test_offline(value: str, hub: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPIPS_FAST_OFFLINE", value)
    with pytest.raises(WeightsNotFoundError, match="LPIPS_FAST_OFFLINE is set") as error:
        load_trunk_weights(NET)
    assert isinstance(error.value, FileNotFoundError) and isinstance(error.value, RuntimeError)
    assert_says_what_to_do(str(error.value), hub)
    assert mirror.requests == []


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_offline_switched_off(
    value: str, mirror: Mirror, official: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LPIPS_FAST_OFFLINE", value)
    mirror.offer(official)
    load_trunk_weights(NET, progress=False)
    assert len(mirror.requests) == 1


def assert_says_what_to_do(message: str, hub: Path) -> None:
    assert TRUNK_SOURCES[NET].url in message
    assert "weights=" in message
    assert "LPIPS_FAST_WEIGHTS" in message
    assert str(hub / FILENAME) in message


def test_download_without_a_place_to_keep_it(
    tmp_path: Path,
    mirror: Mirror,
    official: bytes,
    features: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocked = place(tmp_path / "blocked", b"a file: nobody can make a folder below it")
    monkeypatch.setenv("TORCH_HOME", str(blocked / "torch"))
    mirror.offer(official)
    for attempt in (1, 2):
        with pytest.warns(UserWarning, match="cannot be kept.*downloaded again.*TORCH_HOME"):
            assert_same(load_trunk_weights(NET, progress=False), features)
        assert len(mirror.requests) == attempt


def test_processes_that_start_at_once(
    hub: Path, mirror: Mirror, official: bytes, features: dict[str, Tensor], tmp_path: Path
) -> None:
    mirror.offer(official)
    mirror.meeting = threading.Barrier(3)  # no answer before all three have asked
    program = textwrap.dedent("""
        import sys
        import safetensors.torch
        from lpips_fast.weights import TRUNK_SOURCES, TrunkSource, load_trunk_weights

        net, source, output = sys.argv[1:]
        TRUNK_SOURCES[net] = eval(source)
        safetensors.torch.save_file(load_trunk_weights(net, progress=False), output)
    """)
    root = PACKAGED.parents[1]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    outputs = [tmp_path / f"{number}.safetensors" for number in range(3)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, NET, repr(TRUNK_SOURCES[NET]), str(output)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for output in outputs
    ]
    try:
        for process, output in zip(processes, outputs, strict=True):
            _, errors = process.communicate(timeout=180)
            assert process.returncode == 0, errors
            loaded = safetensors.torch.load_file(output)
            assert_same({name: loaded[name] for name in feature_shapes(NET)}, features)
    finally:
        mirror.meeting.abort()
        for process in processes:
            process.kill()
            process.communicate()
    assert len(mirror.requests) == 3
    assert (hub / FILENAME).read_bytes() == official
    assert_nothing_partial(hub)
    assert_same(load_trunk_weights(NET), features)
    assert len(mirror.requests) == 3


# ---------------------------------------------------------------------------------------------
# Servers that keep one waiting
# ---------------------------------------------------------------------------------------------


def no_patience(monkeypatch: pytest.MonkeyPatch, silence: float, patience: float) -> None:
    """Give up after fractions of a second, for a file of no weight in the total."""
    monkeypatch.setattr(download, "SILENCE", silence)
    monkeypatch.setattr(download, "PATIENCE", patience)
    monkeypatch.setattr(download, "SLOW_LINE", 1 << 40)


@pytest.fixture
def silent_server() -> Iterator[Callable[[bytes], str]]:
    """Makes a server that accepts, says these bytes and then nothing; returns its address."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    held: list[socket.socket] = []

    def answer(head: bytes) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            held.append(connection)
            connection.sendall(head)

    def start(head: bytes) -> str:
        threading.Thread(target=answer, args=(head,), daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}"

    yield start
    for connection in held:
        connection.close()
    server.shutdown(socket.SHUT_RDWR)
    server.close()


@pytest.mark.parametrize(
    "head",
    [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\nsome"],
)
def test_a_silent_server_is_given_up(
    head: bytes,
    hub: Path,
    mirror: Mirror,
    silent_server: Callable[[bytes], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_patience(monkeypatch, silence=0.3, patience=100)
    monkeypatch.setenv("LPIPS_FAST_MIRROR", silent_server(head))
    with pytest.raises(WeightsNotFoundError, match="failed: no byte came for"):
        load_trunk_weights(NET, progress=False)
    assert list(hub.rglob("*")) == []


@pytest.mark.parametrize("where", ["body", "head"])
def test_a_server_that_drips_is_given_up(
    where: str,
    hub: Path,
    mirror: Mirror,
    official: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mirror.offer(official)
    mirror.drip = 0.05
    no_patience(monkeypatch, silence=0.5, patience=1.5)
    words = "it took too long: "
    if where == "head":  # a byte now and then, and the head never ends
        words = "no byte came for"
        with socket.create_server(("127.0.0.1", 0)) as server:
            monkeypatch.setenv("LPIPS_FAST_MIRROR", f"http://127.0.0.1:{server.getsockname()[1]}")
            thread = threading.Thread(target=_drip, args=(server,), daemon=True)
            thread.start()
            with pytest.raises(WeightsNotFoundError, match=words):
                load_trunk_weights(NET, progress=False)
    else:
        with pytest.raises(WeightsNotFoundError, match=words):
            load_trunk_weights(NET, progress=False)
    assert list(hub.rglob("*")) == []


def _drip(server: socket.socket) -> None:
    try:
        connection, _ = server.accept()
        with connection:
            for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
    except OSError:
        pass


def test_the_total_suffices_for_a_slow_line() -> None:
    for source in TRUNK_SOURCES.values():
        seconds = download.PATIENCE + source.size / download.SLOW_LINE
        assert source.size * 8 / seconds < 500_000  # half a megabit a second


# ---------------------------------------------------------------------------------------------
# Around the download
# ---------------------------------------------------------------------------------------------


def test_proxies_of_the_environment(
    mirror: Mirror, official: bytes, features: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The proxy is asked for the whole address, of a server that does not exist.
    monkeypatch.setenv("LPIPS_FAST_MIRROR", "http://weights.invalid/models")
    monkeypatch.setenv("http_proxy", mirror.address.removesuffix("/models"))
    mirror.files[f"http://weights.invalid/models/{FILENAME}"] = official
    assert_same(load_trunk_weights(NET, progress=False), features)
    assert mirror.requests == [f"http://weights.invalid/models/{FILENAME}"]


def test_one_message_without_chained_tracebacks(mirror: Mirror) -> None:
    with pytest.raises(WeightsNotFoundError) as error:
        load_trunk_weights(NET, progress=False)
    text = "".join(traceback.format_exception(error.value))
    assert text.count("Traceback (most recent call last)") == 1
    assert "During handling" not in text and "direct cause" not in text


def test_what_a_killed_process_left_is_removed(
    hub: Path, mirror: Mirror, official: bytes, features: dict[str, Tensor]
) -> None:
    mirror.offer(official)
    mirror.drip, mirror.says_length = 0.2, False  # the process expects the real file
    program = "from lpips_fast.weights import load_trunk_weights as load; load('squeeze')"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGED.parents[1]), *sys.path])},
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            if list(hub.glob("*.partial")):
                break
            time.sleep(0.1)
        else:
            raise AssertionError("no download began")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert len(list(hub.glob("*.partial"))) == 1
    other = place(hub / f"{FILENAME}.0123.partial", b"of another program, perhaps being written")
    mirror.drip = 0.0
    assert_same(load_trunk_weights(NET, progress=False), features)
    assert {p for p in hub.rglob("*") if p.is_file()} == {hub / FILENAME, stripped_path(hub), other}


def test_what_another_process_writes_is_left(
    hub: Path, mirror: Mirror, official: bytes, features: dict[str, Tensor]
) -> None:
    from lpips_fast.weights.whole_files import appearing

    mirror.offer(official)
    with appearing(hub / FILENAME) as file:
        file.write(official)
        file.flush()
        assert_same(load_trunk_weights(NET, progress=False), features)
        assert len(list(hub.glob("*.partial"))) == 1
    assert_nothing_partial(hub)
    assert (hub / FILENAME).read_bytes() == official


def test_full_disk(hub: Path, mirror: Mirror, official: bytes) -> None:
    mirror.offer(official)
    # A limit on the size of files stands for it: EFBIG instead of ENOSPC, at the same place.
    program = textwrap.dedent(f"""
        import resource, signal
        from lpips_fast.weights import TRUNK_SOURCES, TrunkSource, WeightsNotFoundError
        from lpips_fast.weights import load_trunk_weights
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        TRUNK_SOURCES["squeeze"] = {TRUNK_SOURCES[NET]!r}
        try:
            load_trunk_weights("squeeze", progress=False)
        except WeightsNotFoundError as error:
            assert "it cannot be written: File too large" in str(error), error
        else:
            raise AssertionError
    """)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PACKAGED.parents[1]), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(mirror.requests) == 1
    assert [path for path in hub.rglob("*") if path.is_file()] == []
