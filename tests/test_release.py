"""What a release says about itself, in each place where it is said."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lpips_fast

REPOSITORY = Path(__file__).resolve().parents[1]


def citation(field: str) -> str:
    found = re.search(rf"^{field}: (.+)$", (REPOSITORY / "CITATION.cff").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def test_every_file_names_the_version():
    version = lpips_fast.__version__
    assert citation("version") == version
    heading = f"## {version} ({citation('date-released')})"
    assert heading in (REPOSITORY / "CHANGELOG.md").read_text().splitlines()
    series = ".".join(version.split(".")[:2])
    assert f"| {series} | yes |" in (REPOSITORY / "SECURITY.md").read_text()


def test_the_version_is_written_once():
    """pyproject.toml takes it from lpips_fast/version.py, as the package does."""
    assert re.search(r'^dynamic = \["version"\]$', text := pyproject(), re.MULTILINE)
    assert 'version = { attr = "lpips_fast.version.__version__" }' in text
    assert lpips_fast.__version__ not in text


def pyproject() -> str:
    return (REPOSITORY / "pyproject.toml").read_text()


def test_no_torch_is_too_new():
    """A wheel goes on working when torch is upgraded: nothing pins torch from above."""
    requirements = re.findall(r'"(torch[^"a-z]*)"', pyproject().split("[tool.")[0])
    assert requirements == ["torch>=2.10"]


def test_the_toolkit_of_the_wheels_is_that_of_the_extra():
    tomllib = pytest.importorskip("tomllib", reason="Python before 3.11 reads no TOML")
    text = tomllib.loads(pyproject())
    extra = text["project"]["optional-dependencies"]["cuda-build"]
    linux = text["tool"]["cibuildwheel"]["linux"]["before-build"]
    installed = [name for line in linux for name in re.findall(r'"(nvidia-[^"]+)"', line)]
    assert installed == extra


def test_security_is_reported_in_one_way():
    """SECURITY.md, which GitHub shows, and the page say the same."""
    page = " ".join((REPOSITORY / "docs" / "security.md").read_text().split())
    short = " ".join((REPOSITORY / "SECURITY.md").read_text().split())
    for sentence in (
        "(*Security*, *Report a vulnerability*)",
        "Say the version (`lpips-fast info`), the file or the call, and what happened; a crash or "
        "a hang by a file counts.",
        "The newest release gets the fix.",
    ):
        assert sentence in page and sentence in short
