"""The graph of compilers and linkers: what is made again, and what is not."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = '#include "answer.h"\nextern "C" int answer() { return ANSWER + EXTRA; }\n'


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ninja_build", REPOSITORY / "ninja_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Project:
    """One source with a header in a folder whose name needs quotes, built into a library."""

    def __init__(self, build: ModuleType, folder: Path) -> None:
        self.build, self.folder = build, folder
        folder.mkdir()
        (folder / "answer.h").write_text("#define ANSWER 40\n")
        (folder / "answer.cpp").write_text(SOURCE)
        self.object = folder / "objects" / "answer.o"

    def make(self, extra: int = 0, tools: str = "compiler 1") -> int:
        remembered = self.build.remember_tools(self.folder / "tools", tools)
        library = self.folder / "answer.so"
        compilation = self.build.Compilation(
            ["c++", "-fPIC", f"-DEXTRA={extra}"],
            str(self.folder / "answer.cpp"),
            str(self.object),
            remembered,
        )
        linking = self.build.Linking(
            ["c++", "-shared"], [str(self.object)], ["-lm"], str(library), remembered
        )
        self.build.run(self.folder, [compilation], [linking], is_quiet=True)
        copy = self.folder / f"loaded{len(list(self.folder.iterdir()))}.so"
        shutil.copy(library, copy)  # a library is loaded once by its name
        return ctypes.CDLL(str(copy)).answer()


@pytest.fixture
def project(build: ModuleType, tmp_path: Path) -> Project:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    if build.find_ninja() is None:
        pytest.skip("no ninja")
    return Project(build, tmp_path / "a folder: $HOME")


def test_what_has_not_changed_is_not_made_again(project):
    assert project.make() == 40
    made = project.object.stat().st_mtime_ns
    assert project.make() == 40
    assert project.object.stat().st_mtime_ns == made


def test_a_header_a_flag_and_a_source_are_noticed(project):
    assert project.make() == 40
    (project.folder / "answer.h").write_text("#define ANSWER 41\n")
    assert project.make() == 41
    assert project.make(extra=1) == 42
    (project.folder / "answer.cpp").write_text(SOURCE.replace("EXTRA", "EXTRA * 10"))
    assert project.make(extra=1) == 51


def test_another_compiler_makes_everything_again(project):
    project.make()
    made = project.object.stat().st_mtime_ns
    project.make(tools="compiler 2")
    assert project.object.stat().st_mtime_ns > made


def test_a_command_that_fails_ends_the_build(project):
    (project.folder / "answer.cpp").write_text("#error no\n")
    with pytest.raises(SystemExit, match="was not built"):
        project.make()


def test_without_ninja_everything_is_made(project, monkeypatch, capfd):
    monkeypatch.setattr(project.build, "find_ninja", lambda: None)
    assert project.make(extra=2) == 42
    assert "pip install ninja" in capfd.readouterr().err
    (project.folder / "answer.cpp").write_text("#error no\n")
    with pytest.raises(SystemExit, match="failed: "):
        project.make()


def test_as_many_compilers_as_are_allowed(build, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build.jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "")
    assert build.jobs() >= 1
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(SystemExit, match="positive number, not 'many'"):
        build.jobs()
