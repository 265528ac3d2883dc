"""The download of an official checkpoint: whole and verified, or not at all.

The transfer runs in a thread and is watched from outside, so that nothing it waits for (a name
server, a handshake, a server that is silent or sends a byte a minute) can hold the program.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from .sources import OFFICIAL_ADDRESS, TrunkSource
from .whole_files import appearing

MIRROR_VARIABLE = "LPIPS_FAST_MIRROR"

#: Seconds without a byte after which a server is given up.
SILENCE = 20.0
#: Seconds and bytes a second that are allowed to both tries together: a line of half a megabit
#: suffices.
PATIENCE = 60.0
SLOW_LINE = 60_000
TRIES = 2
PAUSE = 1.0

_BLOCK = 64 * 1024
_SCHEMES = ("http", "https", "file")


class DownloadError(Exception):
    """Why a file was not downloaded."""

    def __init__(self, reason: str, again: bool = True) -> None:
        super().__init__(reason)
        self.again = again  # whether another try may succeed


def address(source: TrunkSource) -> str:
    """The URL of a checkpoint, at the official address or at the mirror."""
    base = os.environ.get(MIRROR_VARIABLE) or OFFICIAL_ADDRESS
    return f"{base.rstrip('/')}/{source.filename}"


def download(source: TrunkSource, path: Path, progress: bool) -> None:
    """Download an official checkpoint, in two tries, to `path`.

    Its size and its whole SHA-256 are compared while it arrives. Proxies are those of the
    environment (``https_proxy``, ``no_proxy``).

    Raises:
        DownloadError: it cannot be had; nothing is left behind.
        OSError: it cannot be written.
    """
    url = address(source)
    scheme = url.partition(":")[0].lower()
    if scheme not in _SCHEMES or "://" not in url:
        raise DownloadError(
            f"{MIRROR_VARIABLE} is an address of an unknown type: begin it with one of "
            f"{', '.join(f'{scheme}://' for scheme in _SCHEMES)}"
        )
    end = time.monotonic() + PATIENCE + source.size / SLOW_LINE
    if progress:
        print(f"Downloading {url} ({source.download_mib:.0f} MiB) to {path}", file=sys.stderr)
    for trial in range(1, TRIES + 1):
        try:
            with appearing(path) as file:
                _receive(url, source, file, end, progress)
            return
        except DownloadError as error:
            if not error.again or trial == TRIES or time.monotonic() + PAUSE > end:
                raise
            if progress:
                print(f"{error}; trying again", file=sys.stderr)
            time.sleep(PAUSE)


def _receive(url: str, source: TrunkSource, file: BinaryIO, end: float, progress: bool) -> None:
    transfer = _Transfer(url, source, file)
    bar = tqdm(
        total=source.size,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        mininterval=0.5,
        disable=None if progress else True,  # None: where standard error is no terminal
    )
    with bar:
        transfer.start()
        try:
            while not transfer.finished.wait(0.1):
                if transfer.received > bar.n:
                    bar.update(transfer.received - bar.n)
                now = time.monotonic()
                if now - transfer.heard > SILENCE:
                    raise DownloadError(f"no byte came for {SILENCE:.0f} s")
                if now > end:
                    raise DownloadError(
                        f"it took too long: {transfer.received} of {source.size} bytes have come"
                    )
        finally:
            transfer.abandoned = True  # it ends by itself, at its next byte or its own time-out
        bar.update(transfer.received - bar.n)
    if transfer.failure is not None:
        raise transfer.failure


class _Transfer(threading.Thread):
    """Writes what a URL holds to a file, and notes how far it is.

    Attributes:
        received: bytes so far.
        heard: when the last of them came, by the monotonic clock.
        finished: set when it is over.
        failure: then, why it failed, if it did.
    """

    def __init__(self, url: str, source: TrunkSource, file: BinaryIO) -> None:
        super().__init__(name="lpips_fast download", daemon=True)
        self._url, self._source, self._file = url, source, file
        self.received = 0
        self.heard = time.monotonic()
        self.finished = threading.Event()
        self.abandoned = False
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            self._run()
        except DownloadError as error:
            self.failure = error
        except urllib.error.HTTPError as error:
            error.close()
            again = error.code >= 500 or error.code in (408, 429)
            self.failure = DownloadError(f"the server answered {error.code} {error.reason}", again)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.failure = DownloadError(_reason(error))
        except Exception as error:  # a thread's own traceback would reach nobody
            self.failure = error
        finally:
            self.finished.set()

    def _run(self) -> None:
        size, digest = self._source.size, hashlib.sha256()
        request = urllib.request.Request(self._url, headers={"User-Agent": "lpips-fast"})
        opener = urllib.request.build_opener()  # urlopen's own keeps the proxies of its first call
        with opener.open(request, timeout=SILENCE) as response:
            offered = response.headers.get("Content-Length")
            if offered is not None and offered.strip() != str(size):
                raise DownloadError(
                    f"the server sends another file, of {offered} bytes instead of {size}", False
                )
            while block := response.read1(_BLOCK):
                if self.abandoned:
                    return
                self.received += len(block)
                self.heard = time.monotonic()
                if self.received > size:
                    raise DownloadError(
                        f"the server sends another file, of more than {size} bytes", False
                    )
                digest.update(block)
                self._write(block)
        if self.received < size:
            raise DownloadError(f"it broke off after {self.received} of {size} bytes")
        if digest.hexdigest() != self._source.sha256:
            raise DownloadError(
                f"the server sent another file: its SHA-256 is {digest.hexdigest()}, "
                f"expected {self._source.sha256}"
            )

    def _write(self, block: bytes) -> None:
        try:
            self._file.write(block)
        except OSError as error:  # a full disk: no other try will help
            raise DownloadError(f"it cannot be written: {_reason(error)}", False) from None


def _reason(error: Exception) -> str:
    """An error of the network in words, without the layers that Python wraps around it."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, TimeoutError):
        return f"no byte came for {SILENCE:.0f} s"
    if isinstance(error, socket.gaierror):
        return f"the server's name cannot be resolved ({error.strerror})"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is not trusted ({error.verify_message})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
