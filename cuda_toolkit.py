"""The CUDA toolkit that compiles the kernels: where it is, what it builds for, what will run it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

DEFAULT_ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]


def cuda_home() -> Path | None:
    """The toolkit's root: CUDA_HOME's, the PATH's, or the one of the extra ``cuda-build``."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return Path(os.environ[name])
    nvcc = shutil.which("nvcc")
    if nvcc is not None:  # perhaps a wrapper that runs the real one elsewhere
        run = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
        )
        for line in run.stderr.splitlines():
            if line.startswith("#$ TOP="):
                return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    return packaged_home(sys.path)


def packaged_home(folders: list[str]) -> Path | None:
    """The newest toolkit that PyPI's packages from CUDA 13 on left in one of these folders."""
    found = [nvcc for folder in folders for nvcc in Path(folder).glob("nvidia/cu[0-9]*/bin/nvcc")]
    homes = [nvcc.parents[1] for nvcc in found if nvcc.parents[1].name[2:].isdigit()]
    return max(homes, key=lambda home: int(home.name[2:]), default=None)


def nvcc_output(home: Path, option: str) -> str:
    run = subprocess.run([home / "bin" / "nvcc", option], capture_output=True, text=True)
    return run.stdout


def nvcc_version(home: Path) -> str:
    found = re.search(r"release (\d+\.\d+)", nvcc_output(home, "--version"))
    if found is None:
        sys.exit(f"{home}/bin/nvcc --version does not say which release it is")
    return found[1]


def version_faults(nvcc: str, torch_cuda: str | None, driver: tuple[int, int] | None) -> list[str]:
    """What will not run of kernels that this nvcc builds, a sentence each."""
    major, faults = int(nvcc.split(".")[0]), []
    if torch_cuda is not None and int(torch_cuda.split(".")[0]) < major:
        faults.append(
            f"the CUDA kernels are built by nvcc {nvcc} and will run only where the driver "
            f"supports CUDA {major}, while this torch (CUDA {torch_cuda}) runs with older ones: "
            "there distances take torch's own operators; a toolkit of torch's version avoids that"
        )
    if driver is not None and driver[0] < major:
        faults.append(
            f"this machine's driver supports CUDA {driver[0]}.{driver[1]} and will not run the "
            f"kernels that nvcc {nvcc} builds: update it, or build with an older toolkit"
        )
    return faults


def architectures(home: Path) -> str:
    """TORCH_CUDA_ARCH_LIST, or of the default what this nvcc can build for."""
    listed = re.findall(r"compute_(\d+)", nvcc_output(home, "--list-gpu-arch"))
    known = {f"{number[:-1]}.{number[-1]}" for number in listed}
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not wish:
        found = [arch for arch in DEFAULT_ARCHITECTURES if arch in known or not known]
        return ";".join(found) + "+PTX"
    names = wish.replace(" ", ";").split(";")
    unknown = [n for n in names if known and n.removesuffix("+PTX").rstrip("af") not in known]
    if unknown:
        sys.exit(
            f"TORCH_CUDA_ARCH_LIST names {', '.join(unknown)}, for which nvcc {nvcc_version(home)} "
            f"does not build; it knows {', '.join(sorted(known, key=float))}"
        )
    return wish


def gencode_flags(arch_list: str) -> list[str]:
    flags = []
    for arch in arch_list.replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        if not number.rstrip("af").isdigit():
            sys.exit(
                f"TORCH_CUDA_ARCH_LIST: cannot read {arch!r}; expected numbers like 8.0;9.0+PTX"
            )
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags
