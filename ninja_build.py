"""Runs compilers and linkers as one graph: several at a time, and only for what has changed.

setup.py says which commands; ninja remembers them. A file is made again when its command differs,
when a source or any header that it read is newer, or when the tools are others than they were.
Without ninja everything is made anew, several files at a time all the same.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Compilation:
    """One source to one object; the compiler takes -MD, -MF, -c and -o as GCC does."""

    command: Sequence[str]
    source: str
    target: str
    tools: Path

    def whole_command(self) -> list[str]:
        dependencies = ["-MD", "-MF", f"{self.target}.d"]
        return [*self.command, *dependencies, "-c", self.source, "-o", self.target]


@dataclass(frozen=True)
class Linking:
    """Objects, in their order, to one library."""

    command: Sequence[str]
    objects: Sequence[str]
    libraries: Sequence[str]
    target: str
    tools: Path

    def whole_command(self) -> list[str]:
        return [*self.command, *self.objects, *self.libraries, "-o", self.target]


def remember_tools(path: Path, description: str) -> Path:
    """A file that is newer than what was built, if these are other tools than built it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != description:
        path.write_text(description)
    return path


def jobs() -> int:
    """How many compilers at once: MAX_JOBS, or as many as there are cores."""
    wish = os.environ.get("MAX_JOBS")
    if not wish:
        return os.cpu_count() or 1
    if not wish.isdigit() or int(wish) < 1:
        sys.exit(f"MAX_JOBS must be a positive number, not {wish!r}")
    return int(wish)


def find_ninja() -> str | None:
    """The one of this Python's own packages, whose folder need not be on the PATH, or any."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja")
    return shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")


def run(
    folder: Path,
    compilations: Sequence[Compilation],
    linkings: Sequence[Linking],
    is_quiet: bool = False,
) -> None:
    """Makes all targets; what ninja knows of them is in ``folder``. Exits where a command fails."""
    steps: list[Compilation | Linking] = [*compilations, *linkings]
    for step in steps:
        Path(step.target).parent.mkdir(parents=True, exist_ok=True)
    ninja = find_ninja()
    if ninja is None:
        run_all(compilations, linkings, is_quiet)
        return
    graph = folder / "build.ninja"
    command = [ninja, "-f", str(graph), "-j", str(jobs()), *(["--quiet"] if is_quiet else [])]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two at once would spoil what ninja remembers
        graph.write_text(ninja_file(folder, compilations, linkings))
        failed = subprocess.run(command).returncode != 0
    if failed:
        sys.exit("the compiled part of lpips_fast was not built: see the first error above")


def ninja_file(
    folder: Path, compilations: Sequence[Compilation], linkings: Sequence[Linking]
) -> str:
    lines = ["ninja_required_version = 1.5", f"builddir = {escaped(folder)}"]
    for rule, dependencies in (("compile", ["deps = gcc", "depfile = $out.d"]), ("link", [])):
        lines += [f"rule {rule}", "  command = $whole_command", f"  description = {rule} $out"]
        lines += [f"  {line}" for line in dependencies]
    for compilation in compilations:
        lines += edge("compile", compilation, [compilation.source])
    for linking in linkings:
        lines += edge("link", linking, linking.objects)
    return "\n".join(lines) + "\n"


def edge(rule: str, step: Compilation | Linking, inputs: Sequence[str]) -> list[str]:
    names = " ".join(map(escaped, inputs))
    return [
        f"build {escaped(step.target)}: {rule} {names} | {escaped(step.tools)}",
        "  whole_command = " + shlex.join(step.whole_command()).replace("$", "$$"),
    ]


def escaped(path: str | Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def run_all(
    compilations: Sequence[Compilation], linkings: Sequence[Linking], is_quiet: bool
) -> None:
    print(
        f"lpips_fast: no ninja: all {len(compilations)} files are compiled; with it "
        "(pip install ninja) a second build compiles only what has changed",
        file=sys.stderr,
    )

    def make(step: Compilation | Linking) -> None:
        if not is_quiet:
            print(step.target, flush=True)
        if subprocess.run(step.whole_command()).returncode != 0:
            sys.exit(f"failed: {shlex.join(step.whole_command())}")

    with ThreadPoolExecutor(jobs()) as pool:
        list(pool.map(make, compilations))
        list(pool.map(make, linkings))
