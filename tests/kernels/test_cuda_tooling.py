"""The scripts around the CUDA kernels, as far as they run without a GPU: reports and arguments."""

from __future__ import annotations

import copy
import importlib.util
import os
import runpy
import subprocess
import sys
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


@pytest.fixture
def compile_check() -> ModuleType:
    path = REPOSITORY / "scripts" / "check_cuda_compile.py"
    spec = importlib.util.spec_from_file_location("check_cuda_compile", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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
            case(net="alex", pixels=64, batch=1, share_of_copy=0.1, times_compiled=None),
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
        assert bench.parse_arguments([]).dtype == ["float32", "float16"]
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
        assert "| yes | 1 |" in goals[-2] and "9.2 µs" in goals[-1]
        assert "| max-pooling | float16 | 50.0 | 75% | 1.5 |" in page
        assert "| convolution | float16 | 500.0 |  | 1.2 |" in page

    def test_page_of_a_run_that_measured_little(self, bench):
        results = copy.deepcopy(fake_results())
        results["cases"] = [case(net="alex", pixels=64, batch=1, times_eager=None)]
        results["whole"]["launches"] = None
        results["trunk"] = []
        page = bench.kernel_report.markdown(results)
        assert page.count("not measured |") >= 5
        assert "the profiler saw no kernels" in page


class TestGpuCheck:
    SCRIPT = REPOSITORY / "scripts" / "gpu_check.sh"

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
        command = ["bash", str(self.SCRIPT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    def test_syntax(self):
        done = subprocess.run(["bash", "-n", str(self.SCRIPT)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def test_help_and_mistakes(self):
        assert "--skip-benchmarks" in self.run("--help").stdout
        assert self.run("--nonsense").returncode == 2
        assert self.run("--output").returncode == 2

    def test_without_a_gpu_nothing_is_said_to_be_checked(self):
        done = self.run()
        assert done.returncode == 77
        assert "nothing was checked" in done.stderr


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

    def test_versions_that_do_not_meet(self, build):
        faults = build["version_faults"]
        assert faults("13.0", "13.0", (13, 0)) == faults("12.8", "13.0", (13, 1)) == []
        assert faults("13.0", None, None) == faults("13.1", "13.0", (13, 0)) == []
        (torchs,) = faults("13.0", "12.6", (13, 0))
        assert "nvcc 13.0" in torchs and "CUDA 12.6" in torchs
        (drivers,) = faults("13.0", "13.0", (12, 4))
        assert "driver supports CUDA 12.4" in drivers
        assert len(faults("13.0", "12.6", (12, 4))) == 2
