"""A user's script, checked strictly against the package as it is installed: by its py.typed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import lpips_fast

pytest.importorskip("mypy", reason="mypy is not installed: extra dev")
REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "tests" / "typing" / "user_script.py"


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python with what a wheel would bring in its site-packages, and this one's packages behind."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    package = Path(lpips_fast.__file__).parent
    ignored = shutil.ignore_patterns("*.so", "*.safetensors", "*.pth", "__pycache__")
    shutil.copytree(package, site / package.name, ignore=ignored)
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def check(script: Path, interpreter: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    options = ["--strict", "--python-executable", str(interpreter), "--config-file="]
    options += ["--cache-dir", str(REPOSITORY / ".mypy_cache" / "user"), "--no-error-summary"]
    return subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(script)],
        cwd=interpreter.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_users_script(interpreter):
    done = check(SCRIPT, interpreter)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_check_sees_the_installed_package(interpreter, tmp_path):
    """And is none that passes whatever is written."""
    script = tmp_path / "wrong.py"
    script.write_text(
        'import lpips_fast\n\nlpips_fast.LPIPS(net="resnet")\nreveal_type(lpips_fast)\n'
    )
    done = check(script, interpreter)
    assert done.returncode == 1
    assert 'expected "Literal[' in done.stdout and "'alex'" in done.stdout
    site = next(interpreter.parents[1].glob("lib/python*/site-packages/lpips_fast/py.typed"))
    site.rename(site.with_name("py.typed.away"))
    try:
        untyped = check(script, interpreter)
    finally:
        site.with_name("py.typed.away").rename(site)
    assert "py.typed" in untyped.stdout or "import-untyped" in untyped.stdout
