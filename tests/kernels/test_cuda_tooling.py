"""The scripts around the CUDA kernels, as far as they run without a GPU: reports and arguments."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]

PTXAS = """\
ptxas info    : Compiling entry function '_ZN10lpips_fast4cuda4fastIfLb1EEEv' for 'sm_90'
ptxas info    : Function properties for _ZN10lpips_fast4cuda4fastIfLb1EEEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 4160 bytes smem
ptxas info    : Compiling entry function '_ZN10lpips_fast4cuda4fastIfLb1EEEv' for 'sm_120'
ptxas info    : Function properties for _ZN10lpips_fast4cuda4fastIfLb1EEEv
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


def load_script(name: str) -> ModuleType:
    path = REPOSITORY / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def compile_check() -> ModuleType:
    return load_script("check_cuda_compile")


class TestCompileReport:
    def test_reads_registers_spills_and_shared_memory(self, compile_check):
        good, bad = compile_check.parse_report(PTXAS)
        assert (good.architecture, good.registers, good.shared_bytes) == ("90", 64, 4160)
        assert (good.stack_bytes, good.spill_bytes) == (0, 0)
        assert (bad.architecture, bad.registers, bad.shared_bytes) == ("120", 255, 0)
        assert (bad.stack_bytes, bad.spill_bytes) == (16, 12)

    def test_names_what_spills(self, compile_check):
        (line,) = compile_check.spills(compile_check.parse_report(PTXAS))
        assert "sm_120: 16 bytes of stack, 12 bytes of spills" in line

    def test_table_marks_what_spills(self, compile_check):
        header, _, row = compile_check.table(compile_check.parse_report(PTXAS)).split("\n")
        assert header.index("sm_90") < header.index("sm_120")
        assert "64 |" in row and "!255" in row

    def test_too_many_registers_in_a_hot_kernel(self, compile_check):
        report = compile_check.KernelReport(
            "90", "channels_last_distance<float, true>", 96, 64, 0, 0
        )
        (line,) = compile_check.excess_registers([report])
        assert "96 registers" in line and "64" in line
        report.registers = 64
        assert not compile_check.excess_registers([report])

    def test_without_a_toolkit_it_skips_with_77(self, tmp_path):
        environment = {**os.environ, "CUDA_HOME": str(tmp_path)}
        script = REPOSITORY / "scripts" / "check_cuda_compile.py"
        done = subprocess.run(
            [sys.executable, str(script)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 77
        assert "no CUDA toolkit" in done.stdout


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module ``benchmarks/bench_cuda_kernels.py``, which is a script's and not installed."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import bench_cuda_kernels

    yield bench_cuda_kernels
    for script in (REPOSITORY / "benchmarks").glob("*.py"):
        if script.stem in set(sys.modules) - before:
            del sys.modules[script.stem]


def case(**changes: Any) -> dict[str, Any]:
    return {
        **{"net": "vgg", "pixels": 256, "batch": 8, "layer": "relu1_2"},
        **{"shape": [8, 64, 256, 256], "dtype": "float32", "direction": "forward"},
        **{"bytes": 268435456, "seconds": 70e-6, "share_of_copy": 0.89},
        **{"times_eager": 9.5, "times_compiled": 2.25},
        **changes,
    }


def fake_results() -> dict[str, Any]:
    return {
        "facts": {"Device": "Some GPU", "torch": "2.13.0"},
        "command": "python benchmarks/bench_cuda_kernels.py",
        "copy_bandwidth": 4.3e12,
        "whole": {"seconds": 9.25e-6, "launches": 1},
        "trunk": [
            {
                **{"name": "max-pooling", "dtype": "float16", "seconds": 50e-6},
                **{"share_of_copy": 0.75, "times_torch": 1.5},
            },
            {
                **{"name": "convolution", "dtype": "float16", "seconds": 500e-6},
                **{"share_of_copy": None, "times_torch": 1.25},
            },
        ],
        "cases": [
            case(),
            case(layer="relu2_2", share_of_copy=0.84),
            case(direction="backward", share_of_copy=0.81, times_eager=7.0, times_compiled=None),
            case(net="alex", bytes=10**6, share_of_copy=0.1, times_compiled=None),
        ],
    }


class TestKernelBenchmark:
    def test_layers_of_the_trunks(self, bench):
        layers = bench.trunk_layers("alex", 64, 2)
        assert layers[0].shape == (2, 64, 15, 15) and layers[-1].shape == (2, 256, 3, 3)
        shapes = [layer.shape for layer in bench.all_layers(quick=False)]
        assert len(shapes) == len(set(shapes))
        assert (32, 64, 512, 512) in shapes and (1, 64, 15, 15) in shapes
        assert len(list(bench.all_layers(quick=True))) == 9  # relu4 and relu5 of alex are alike

    def test_bytes_that_must_move(self, bench):
        layer = bench.Layer("vgg", 256, 1, "relu1_2", (1, 64, 4, 4))
        assert layer.bytes_moved("forward", torch.float16) == 2 * 64 * 16 * 2
        assert layer.bytes_moved("backward", torch.float32) == 4 * 64 * 16 * 4

    def test_formula_is_the_original(self, bench):
        from lpips_fast import composed

        a, b, w = torch.rand(2, 8, 3, 3), torch.rand(2, 8, 3, 3), torch.rand(8)
        ours = composed.distance([a], [b], [w])
        assert torch.allclose(bench.original_formula(a, b, w).flatten(), ours.flatten(), rtol=1e-5)

    def test_arguments(self, bench):
        assert bench.parse_arguments([]).dtype == ["float32", "float16", "bfloat16"]
        options = bench.parse_arguments(["--quick", "--dtype", "bfloat16", "--repeats", "3"])
        assert options.quick and options.dtype == ["bfloat16"] and options.repeats == 3
        with pytest.raises(SystemExit):
            bench.parse_arguments(["--dtype", "int8"])

    def test_without_a_gpu_it_says_so(self, bench, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(sys, "argv", ["bench_cuda_kernels.py"])
        with pytest.raises(SystemExit, match="needs a CUDA device"):
            bench.main()

    def test_page(self, bench):
        page = bench.kernel_report.markdown(fake_results())
        assert page.startswith("# CUDA kernels on Some GPU\n")
        assert "4,300 GB/s" in page
        rows = [
            line for line in page.split("\n") if line.startswith("| vgg 256², batch 8, relu1_2")
        ]
        assert rows[0].split("|")[2:8] == [
            *(" 64 × 256 × 256 ", " 70.0 ", " 3,835 ", " 89% ", " 9.5 ", " 2.2 "),
        ]
        goals = [line for line in page.split("\n") if "at least" in line or "at most" in line]
        assert "1 of 2 | 84% to 89%" in goals[0]
        assert "| yes | 9.5× to 9.5× |" in goals[1]
        assert "from 60 MB on" in goals[0] and "from 60 MB on" in goals[2]
        assert "0 of 1 | 81% to 81%" in goals[3]
        assert "| yes | 1 |" in goals[-2] and "9.2 µs" in goals[-1]
        assert "| max-pooling | float16 | 50.0 | 75% | 1.5 |" in page
        assert "| convolution | float16 | 500.0 |  | 1.2 |" in page

    def test_goals_are_stated_by_bytes(self, bench):
        report = bench.kernel_report
        for size, counts in ((59_999_999, False), (60_000_000, True)):
            assert report.is_goal_case(case(net="alex", pixels=64, bytes=size)) is counts

    def test_goes_on_with_what_is_left(self, bench, tmp_path, monkeypatch):
        """A budget that ends, twice; nothing is measured again, and nothing is left out."""
        measured = []

        def measure(layer, direction, dtype, bandwidth, options):
            measured.append((layer.tap, str(dtype), direction))
            changes = {"layer": layer.tap, "dtype": str(dtype).removeprefix("torch.")}
            shape, net = list(layer.shape), layer.net
            return case(direction=direction, shape=shape, net=net, **changes)

        clock = itertools.count()
        monkeypatch.setattr(bench, "measure", measure)
        monkeypatch.setattr(bench, "measure_whole", lambda repeats: fake_results()["whole"])
        monkeypatch.setattr(bench, "measure_trunk", lambda dtype, bandwidth, repeats: iter(()))
        monkeypatch.setattr(bench, "copy_bandwidth", lambda: 4e12)
        monkeypatch.setattr(bench.machine, "name", lambda device: "Some GPU")
        monkeypatch.setattr(bench.machine, "slug", lambda device: "some-gpu")
        monkeypatch.setattr(bench.machine, "facts", lambda device: fake_results()["facts"])
        monkeypatch.setattr(bench.time, "monotonic", lambda: next(clock))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        arguments = ["--quick", "--output", str(tmp_path), "--budget"]
        for budget, code in (("3", 75), ("3", 75), ("1000", 0)):
            with pytest.raises(SystemExit) as ended:
                bench.main([*arguments, budget])
            assert ended.value.code == code
        assert len(measured) == len(set(measured)) == 9 * 3 * 2
        assert (tmp_path / "some-gpu-kernels-quick.md").exists()
        with pytest.raises(SystemExit):
            bench.main([*arguments, "1000"])
        assert len(measured) == 9 * 3 * 2

    def test_page_of_a_run_that_measured_little(self, bench):
        results = copy.deepcopy(fake_results())
        results["cases"] = [case(net="alex", bytes=10**6, times_eager=None)]
        results["whole"]["launches"] = None
        results["trunk"] = []
        page = bench.kernel_report.markdown(results)
        assert page.count("not measured |") >= 5
        assert "the profiler saw no kernels" in page


@pytest.fixture
def gpu_check() -> Any:
    return load_script("gpu_check")


class TestGpuCheck:
    FACTS = {"device": "Some GPU", "torch": "2.13.0", "sources": "abc"}  # noqa: RUF012

    def steps(self, gpu_check, *names: str, limit: int = 100) -> list[Any]:
        return [gpu_check.Step(name, [sys.executable, "-c", ""], limit) for name in names]

    def test_every_step_fits_in_a_slice(self, gpu_check, tmp_path):
        found = gpu_check.steps("9.0", tmp_path, quick=False)
        assert max(step.limit for step in found) <= gpu_check.SLICE < 480
        names = [step.name for step in found]
        assert names[0] == "build for 9.0" and len(set(names)) == len(names)
        for tool, dtype in itertools.product(
            ("memcheck", "racecheck", "synccheck", "initcheck"), gpu_check.DTYPES
        ):
            (step,) = (s for s in found if s.name == f"{tool}, {dtype}")
            assert ("--report-api-errors" in step.command) is (tool == "memcheck")
        # Every test file is in a step.
        arguments = {word for step in found for word in step.command if word.startswith("tests/")}
        for path in (REPOSITORY / "tests").rglob("test_*.py"):
            name = path.relative_to(REPOSITORY)
            assert str(name) in arguments or str(name.parent) in arguments, name

    def test_what_a_step_says_is_kept(self, gpu_check):
        code = "import os, sys; print('words'); sys.exit(int(os.environ['CODE']))"
        for code_wanted, status in (("0", "passed"), ("1", "failed"), ("75", "unfinished")):
            command = [sys.executable, "-c", code]
            result = gpu_check.run(gpu_check.Step("a", command, 60, {"CODE": code_wanted}))
            assert (result.status, result.output) == (status, "words\n")
        result = gpu_check.run(gpu_check.Step("a", ["none"], 60, missing="it is not installed"))
        assert (result.status, result.output) == ("skipped", "it is not installed")

    def test_a_step_that_takes_too_long_is_ended_with_all_it_started(self, gpu_check, tmp_path):
        mark = tmp_path / "mark"
        child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
        code = (
            "import subprocess, sys, time; print('begun', flush=True); "
            f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
        )
        result = gpu_check.run(gpu_check.Step("slow", [sys.executable, "-c", code], 1))
        assert result.status == "timed out" and result.output == "begun\n"
        time.sleep(3)
        assert not mark.exists()

    def test_slices_go_on_where_the_last_one_ended(self, gpu_check, tmp_path, capsys):
        path, todo = tmp_path / "record.json", self.steps(gpu_check, "a", "b", "c", "d")
        now, ran = [0.0], []
        failures = ["b"]  # fails once

        def runner(step):
            ran.append(step.name)
            now[0] += 60
            status = "passed"
            if step.name in failures:
                failures.remove(step.name)
                status = "failed"
            return gpu_check.Result(status, 60, f"output of {step.name}")

        def one_slice(seconds: float | None) -> int:
            ran.clear()
            record = gpu_check.Record(path, self.FACTS)
            return gpu_check.go_on(todo, record, seconds, runner, lambda: now[0])

        assert one_slice(250) == gpu_check.MORE_TO_DO
        assert ran == ["a", "b", "c"]  # d's limit of 100 s would end after 280
        assert "run it again" in capsys.readouterr().out
        assert one_slice(None) == 0 and ran == ["b", "d"]  # what failed, and what was left
        page = path.with_suffix(".md").read_text()
        assert "| d | passed | 60 |" in page
        assert one_slice(250) == 0 and ran == []

    def test_a_failure_does_not_stop_the_others_and_is_told(self, gpu_check, tmp_path, capsys):
        record = gpu_check.Record(tmp_path / "record.json", self.FACTS)
        results = {"a": "failed", "b": "timed out", "c": "skipped", "d": "passed"}

        def runner(step):
            return gpu_check.Result(results[step.name], 1, f"words of {step.name}")

        assert gpu_check.go_on(self.steps(gpu_check, *results), record, None, runner) == 1
        page = (tmp_path / "record.md").read_text()
        assert "| c | skipped (words of c) | 1 |" in page
        assert "## a\n\n```\nwords of a\n```" in page and "## d" not in page
        assert "failed: a" in capsys.readouterr().out

    def test_what_goes_on_by_itself_is_run_again(self, gpu_check, tmp_path):
        record = gpu_check.Record(tmp_path / "record.json", self.FACTS)
        statuses = iter(["unfinished", "unfinished", "passed"])

        def runner(step):
            return gpu_check.Result(next(statuses), 1, "")

        todo = self.steps(gpu_check, "benchmarks")
        assert gpu_check.go_on(todo, record, 450, runner) == gpu_check.MORE_TO_DO
        assert gpu_check.go_on(todo, record, None, runner) == 0

    def test_other_sources_or_another_torch_begin_anew(self, gpu_check, tmp_path):
        path = tmp_path / "record.json"
        gpu_check.Record(path, self.FACTS).add("a", gpu_check.Result("passed", 1, ""))
        assert "a" in gpu_check.Record(path, self.FACTS).results
        for changed in ({"sources": "abd"}, {"torch": "2.14.0"}):
            assert not gpu_check.Record(path, {**self.FACTS, **changed}).results

    def test_without_a_gpu_nothing_is_said_to_be_checked(self):
        command = [sys.executable, str(REPOSITORY / "scripts" / "gpu_check.py")]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 77
        assert "nothing was checked" in done.stderr

    def test_it_runs_every_kernel(self):
        """The names of the operators that scripts/gpu_every_kernel.py calls."""
        text = (REPOSITORY / "scripts" / "gpu_every_kernel.py").read_text()
        compiled = load_script("check_cuda_compile").OPERATORS
        called = {"distance", "distance_map"}  # through functional, with their backward operators
        for name in {n.removesuffix("_backward") for n in compiled}:
            assert name in called or f".{name}(" in text or f".{name}_backward(" in text, name


class TestBuild:
    """setup.py with a toolkit that is played: what it builds for, and what it says."""

    @pytest.fixture
    def build(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        import setuptools

        monkeypatch.setattr(setuptools, "setup", lambda **_: None)
        monkeypatch.setenv("LPIPS_FAST_CUDA", "0")
        return runpy.run_path(str(REPOSITORY / "setup.py"))

    @pytest.fixture
    def toolkit(self, tmp_path: Path) -> Path:
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text(
            "#!/bin/sh\n"
            'case "$1" in\n'
            "  --version) echo 'Cuda compilation tools, release 12.4, V12.4.131' ;;\n"
            "  --list-gpu-arch) echo 'compute_70\ncompute_75\ncompute_80\ncompute_90' ;;\n"
            "esac\n"
        )
        nvcc.chmod(0o755)
        return tmp_path

    def test_an_older_toolkit_builds_what_it_knows(self, build, toolkit, monkeypatch):
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        assert build["nvcc_version"](toolkit) == "12.4"
        assert build["architectures"](toolkit) == "7.5;8.0;9.0+PTX"
        flags = build["gencode_flags"]("7.5;8.0;9.0+PTX")
        assert flags[-2:] == [
            "-gencode=arch=compute_90,code=sm_90",
            "-gencode=arch=compute_90,code=compute_90",
        ]

    def test_architectures_that_are_asked_for(self, build, toolkit, monkeypatch):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0 8.0+PTX")
        assert build["architectures"](toolkit) == "7.0 8.0+PTX"
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;12.0+PTX")
        with pytest.raises(SystemExit, match=r"12\.0\+PTX, for which nvcc 12\.4 does not build"):
            build["architectures"](toolkit)

    def test_the_toolkit_of_python_packages_is_found(self, build, tmp_path, monkeypatch):
        """As ``cuda-build`` installs it, where nothing else names a toolkit; the newest one."""
        for name in ("CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(sys, "path", [str(tmp_path / "a"), str(tmp_path / "b")])
        assert build["cuda_home"]() is None
        for home in ("a/nvidia/cu13", "b/nvidia/cu14", "b/nvidia/cu_headers"):
            (tmp_path / home / "bin").mkdir(parents=True)
            (tmp_path / home / "bin" / "nvcc").touch()
        (tmp_path / "b/nvidia/cu15").mkdir()  # torch's own libraries, without a compiler
        assert build["cuda_home"]() == tmp_path / "b/nvidia/cu14"
        monkeypatch.setenv("CUDA_HOME", "/elsewhere")
        assert build["cuda_home"]() == Path("/elsewhere")

    def test_versions_that_do_not_meet(self, build):
        faults = build["version_faults"]
        assert faults("13.0", "13.0", (13, 0)) == faults("12.8", "13.0", (13, 1)) == []
        assert faults("13.0", None, None) == faults("13.1", "13.0", (13, 0)) == []
        (torchs,) = faults("13.0", "12.6", (13, 0))
        assert "nvcc 13.0" in torchs and "CUDA 12.6" in torchs
        (drivers,) = faults("13.0", "13.0", (12, 4))
        assert "driver supports CUDA 12.4" in drivers
        assert len(faults("13.0", "12.6", (12, 4))) == 2
