"""Compiles the CPU kernels for ARM and runs them in emulation, on a machine that is none.

    python scripts/check_arm.py [--rounds 20] [--jobs 2]

The torch-free kernels of csrc/cpu with the driver of tests/sanitize, by a cross compiler, for NEON
as torch's at::vec has it; qemu runs the result and compares with float64. On Debian and Ubuntu:
apt-get install g++-aarch64-linux-gnu qemu-user. Torch's side of the operators is not run so.
Exit code: 0 passed, 1 failed, 77 skipped because a tool is missing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time

from sanitize import FLAGS, REPOSITORY, compile_kernel_driver, run

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
BUILD = REPOSITORY / "build" / "arm"
SKIPPED = 77


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="of the driver")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once")
    options = parser.parse_args()

    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    if missing:
        print(f"SKIPPED: there is no {', no '.join(missing)}")
        sys.exit(SKIPPED)
    began = time.perf_counter()
    # Static, so that the emulator needs no system of the other kind around it.
    flags = ["-O2", "-static", *FLAGS, "-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT=1"]
    driver = compile_kernel_driver(COMPILER, flags, BUILD, options.jobs)
    print(f"{time.perf_counter() - began:6.1f} s  compiled by {version(COMPILER)}", flush=True)
    run([EMULATOR, str(driver), str(options.rounds)])
    print(f"{time.perf_counter() - began:6.1f} s  ran under {version(EMULATOR)}")


def version(tool: str) -> str:
    done = subprocess.run([tool, "--version"], capture_output=True, text=True)
    return done.stdout.splitlines()[0]


if __name__ == "__main__":
    main()
