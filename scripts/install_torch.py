"""Installs a torch fit for the machine into the running Python, unless one is there already.

With an NVIDIA GPU: the CUDA build from PyPI. Without: a build without CUDA, from PyTorch's CPU
index where that can be reached, and otherwise the pinned version from pip's own sources.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import urllib.request

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PINNED = "torch==2.13.0"
MINIMUM = "torch>=2.10"


def has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


def reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def install(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", *arguments]
    print("install_torch:", " ".join(command[2:]), flush=True)
    subprocess.run(command, check=True)


def main() -> None:
    if importlib.util.find_spec("torch") is not None:
        print("install_torch: torch is already there")
    elif has_gpu():
        install(MINIMUM)
    elif reachable(f"{CPU_INDEX}/torch/"):
        install(MINIMUM, "--index-url", CPU_INDEX)
    else:
        install(PINNED)


if __name__ == "__main__":
    main()
