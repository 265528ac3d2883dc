"""Builds the compiled part of lpips_fast. Everything declarative is in pyproject.toml.

Environment:
    LPIPS_FAST_CUDA       1: build the CUDA kernels, or fail; 0: do not; unset: build them when
                          both a CUDA build of torch and a CUDA toolkit are there.
    TORCH_CUDA_ARCH_LIST  the GPUs to build for, as in torch ("8.0;9.0+PTX"); default: see below.
    LPIPS_FAST_SANITIZE   1: with AddressSanitizer and UndefinedBehaviorSanitizer, for this
                          machine's instruction set alone (scripts/sanitize.py).
    CUDA_HOME             the CUDA toolkit; default: the one of nvcc on the PATH.
    MAX_JOBS              compilers to run at once.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
except ImportError:
    # An isolated build hides the environment that it installs into, and with it the one torch that
    # will load the extension. Look there: to build against any other would be the mistake.
    sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    try:
        import torch
    except ImportError:
        sys.exit(
            "lpips_fast is built against the torch that will load it, and none is installed in "
            f"{sysconfig.get_path('purelib')}. Install torch 2.10 or later there first, then run: "
            "pip install setuptools wheel pybind11 ninja && pip install --no-build-isolation ."
        )

from torch.utils import cpp_extension

try:
    from pybind11 import get_include as pybind11_include
except ImportError:

    def pybind11_include() -> str:  # torch ships the headers with its own
        return cpp_extension.include_paths()[0]


ROOT = Path(__file__).parent
MINIMUM_TORCH = (2, 10)
DEFAULT_ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
CUDA_SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").glob("*.cu"))

# at::vec is chosen at compile time, so the CPU kernels are built once per capability that torch
# itself distinguishes, each into a library of its own; kernels/libraries.py loads the right one.
X86_CAPABILITIES = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c",
}
CXX_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
# Spurious in GCC's own AVX512 headers: https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593
GCC_FLAGS = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
SANITIZE = os.environ.get("LPIPS_FAST_SANITIZE") == "1"
SANITIZER_FLAGS = [
    *("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"),
    *("-O1", "-g"),
]
# Messages name files as a reader of the sources knows them, not as they lie here.
PREFIX_MAPS = [
    f"-fmacro-prefix-map={folder}/=" for folder in (*cpp_extension.include_paths(), str(ROOT))
]
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden,-Wall", "--threads=2"]


def torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def cuda_home() -> Path | None:
    """The toolkit's root: nvcc on the PATH may be a wrapper that runs the real one elsewhere."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return Path(os.environ[name])
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        run = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
        )
        for line in run.stderr.splitlines():
            if line.startswith("#$ TOP="):
                return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    return None


def cuda_decision() -> tuple[Path | None, str]:
    """The toolkit to build the CUDA kernels with, or None; and the reason in words."""
    wish = os.environ.get("LPIPS_FAST_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"LPIPS_FAST_CUDA must be 0, 1 or unset, not {wish!r}")
    if wish == "0":
        return None, "LPIPS_FAST_CUDA=0"
    home = cuda_home()
    if home is None or not (home / "bin" / "nvcc").exists():
        where = "no nvcc on the PATH and no CUDA_HOME" if home is None else f"no nvcc in {home}/bin"
        if wish == "1":
            sys.exit(f"LPIPS_FAST_CUDA=1 asks for the CUDA kernels, but there is {where}")
        return None, where
    if wish == "1":
        return home, f"LPIPS_FAST_CUDA=1, toolkit {home}"
    if torch.version.cuda is None:
        return (
            None,
            f"torch {torch.__version__} is a build without CUDA "
            "(LPIPS_FAST_CUDA=1 builds the kernels all the same)",
        )
    return home, f"torch {torch.__version__} has CUDA {torch.version.cuda}, toolkit {home}"


def nvcc_output(home: Path, option: str) -> str:
    run = subprocess.run([home / "bin" / "nvcc", option], capture_output=True, text=True)
    return run.stdout


def nvcc_version(home: Path) -> str:
    found = re.search(r"release (\d+\.\d+)", nvcc_output(home, "--version"))
    if found is None:
        sys.exit(f"{home}/bin/nvcc --version does not say which release it is")
    return found[1]


def driver_version() -> tuple[int, int] | None:
    """The CUDA version that this machine's driver supports, or None where there is no driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


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


def compiler_version() -> str:
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
    run = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    return run.stdout.splitlines()[0] if run.stdout else compiler


class Build(cpp_extension.BuildExtension):
    """Torch's build, with one object folder per extension, since some share their sources, and
    with nvcc for the CUDA one without torch's demand for a CUDA build of torch."""

    def build_extension(self, ext: Extension) -> None:
        shared_folder = self.build_temp
        self.build_temp = str(Path(shared_folder) / ext.name.split(".")[-1])
        try:
            if isinstance(ext, CUDALibrary):
                self.build_cuda(ext)
            else:
                super().build_extension(ext)
        finally:
            self.build_temp = shared_folder

    def build_cuda(self, ext: CUDALibrary) -> None:
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        nvcc = str(ext.toolkit / "bin" / "nvcc")
        includes = [f"-isystem={path}" for path in cpp_extension.include_paths()]
        objects = []
        for source in ext.cuda_sources:
            target = str(folder / (Path(source).stem + ".o"))
            self.spawn(
                [
                    nvcc,
                    *NVCC_FLAGS,
                    *(f"-Xcompiler={flag}" for flag in PREFIX_MAPS),
                    *ext.gencode,
                    "-DUSE_CUDA",
                    "-Xcompiler=-fPIC",
                    *includes,
                    "-c",
                    source,
                    "-o",
                    target,
                ]
            )
            objects.append(target)
        output = self.get_ext_fullpath(ext.name)
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        # libtorch and libtorch_cpu hold the stable ABI's functions; the CUDA runtime is static.
        self.spawn(
            [
                nvcc,
                "-shared",
                *objects,
                "-o",
                output,
                *libraries,
                "-cudart=static",
                "-Xlinker=--no-as-needed",
                "-ltorch",
                "-ltorch_cpu",
                "-lc10",
            ]
        )


class CUDALibrary(Extension):
    def __init__(self, name: str, sources: list[str], toolkit: Path, gencode: list[str]) -> None:
        # Torch's build demands a CUDA torch of any extension that lists CUDA sources.
        super().__init__(name, [], depends=[str(p) for p in (ROOT / "csrc").rglob("*h")])
        self.cuda_sources = sources
        self.toolkit = toolkit
        self.gencode = gencode


def cpu_extension(
    name: str, sources: list[str], flags: list[str], define: dict[str, str]
) -> Extension:
    gcc = [] if sys.platform == "darwin" else GCC_FLAGS
    return cpp_extension.CppExtension(
        f"lpips_fast.kernels.{name}",
        sources,
        include_dirs=[pybind11_include()],
        define_macros=list(define.items()),
        # Torch's headers as system headers: warnings are for our own code.
        extra_compile_args=CXX_FLAGS
        + PREFIX_MAPS
        + gcc
        + [f"-isystem{path}" for path in cpp_extension.include_paths()]
        + flags
        + (SANITIZER_FLAGS if SANITIZE else []),
        extra_link_args=SANITIZER_FLAGS if SANITIZE else [],
        depends=[str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")],
    )


def extensions() -> list[Extension]:
    if torch_version() < MINIMUM_TORCH:
        sys.exit(
            f"lpips_fast needs torch 2.10 or later (for its stable ABI), found {torch.__version__}"
        )
    toolkit, reason = cuda_decision()
    arch_list, nvcc = "none", "none"
    if toolkit:
        arch_list, nvcc = architectures(toolkit), nvcc_version(toolkit)
    print(f"lpips_fast: {'with' if toolkit else 'without'} CUDA kernels: {reason}", file=sys.stderr)
    if toolkit:
        for fault in version_faults(nvcc, torch.version.cuda, driver_version()):
            print(f"lpips_fast: warning: {fault}", file=sys.stderr)

    capabilities = {"default": ""}
    if platform.machine().lower() in ("x86_64", "amd64"):
        capabilities |= X86_CAPABILITIES
    if SANITIZE:
        own = torch.backends.cpu.get_cpu_capability().lower()
        capabilities = {own: capabilities[own]} if own in capabilities else {"default": ""}
    info = {
        "torch": torch.__version__,
        "compiler": compiler_version(),
        "cpu_capabilities": ", ".join(capabilities),
        "cuda": reason,
        "cuda_arch_list": arch_list,
        "nvcc": nvcc,
    }
    result = [
        cpu_extension(
            "_C",
            ["csrc/ops.cpp", "csrc/python_module.cpp"],
            [],
            {"LPIPS_FAST_BUILD_INFO": json.dumps(json.dumps(info))},
        )
    ]
    for capability, flags in capabilities.items():
        macro = capability.upper()
        result.append(
            cpu_extension(
                f"_cpu_{capability}",
                sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp")),
                ["-ffp-contract=off", *flags.split()],
                {"CPU_CAPABILITY": macro, f"CPU_CAPABILITY_{macro}": "1"},
            )
        )
    if toolkit:
        result.append(
            CUDALibrary("lpips_fast.kernels._cuda", CUDA_SOURCES, toolkit, gencode_flags(arch_list))
        )
    return result


setup(
    ext_modules=extensions(), cmdclass={"build_ext": Build.with_options(no_python_abi_suffix=False)}
)
