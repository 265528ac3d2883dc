"""Builds the compiled part of lpips_fast. Everything declarative is in pyproject.toml.

Environment:
    LPIPS_FAST_CUDA       1: build the CUDA kernels, or fail; 0: do not; unset: build them when
                          both a CUDA build of torch and a CUDA toolkit are there.
    TORCH_CUDA_ARCH_LIST  the GPUs to build for, as in torch ("8.0;9.0+PTX"); default: see below.
    LPIPS_FAST_SANITIZE   1: with AddressSanitizer and UndefinedBehaviorSanitizer, for this
                          machine's instruction set alone (scripts/sanitize.py).
    CUDA_HOME             the CUDA toolkit; default: the one of nvcc on the PATH, or else of the
                          packages that the extra cuda-build installs.
    CXX                   the C++ compiler; default: c++.
    CPPFLAGS, CXXFLAGS, LDFLAGS   further flags of the C++ libraries, as "-g".
    MAX_JOBS              compilers to run at once; default: one a core.
"""

from __future__ import annotations

import json
import os
import platform
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
if (ROOT / "pyproject.toml").exists() and int(setuptools.__version__.split(".")[0]) < 77:
    # Older ones take the licence of pyproject.toml for an error, and say so on two pages.
    sys.exit(
        f"lpips_fast is built with setuptools 77 or later, and this is {setuptools.__version__}: "
        'pip install --upgrade "setuptools>=77"'
    )

try:
    import torch
except ImportError:
    # An isolated build hides the environment that it installs into, and with it the one torch that
    # will load the extension. Look there: to build against any other would be the mistake.
    sys.path += site.getsitepackages()
    try:
        import torch
    except ImportError:
        sys.exit(
            "lpips_fast is built against the torch that will load it, and none is installed in "
            f"{' or '.join(site.getsitepackages())}. Install torch 2.10 or later there first: "
            'pip install torch "setuptools>=77" wheel pybind11 ninja, and then, with '
            "--no-build-isolation, what you have just tried"
        )

from torch.utils import cpp_extension  # noqa: E402

try:
    from pybind11 import get_include as pybind11_include
except ImportError:

    def pybind11_include() -> str:  # torch ships the headers with its own
        return cpp_extension.include_paths()[0]


sys.path.insert(0, str(ROOT))  # a build of pyproject.toml runs this file from elsewhere
import ninja_build  # noqa: E402
from cuda_toolkit import (  # noqa: E402
    architectures,
    cuda_home,
    gencode_flags,
    nvcc_output,
    nvcc_version,
    version_faults,
)

sys.path.remove(str(ROOT))
# By its path: the package itself cannot be imported before it is built.
driver_version = runpy.run_path(str(ROOT / "lpips_fast" / "kernels" / "cuda_device.py"))[
    "driver_version"
]

MINIMUM_TORCH = (2, 10)
CUDA_SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").glob("*.cu"))

# at::vec is chosen at compile time, so the CPU kernels are built once per capability that torch
# itself distinguishes, each into a library of its own; kernels/libraries.py loads the right one.
X86_CAPABILITIES = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c",
}
CXX_FLAGS = [
    *("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-fwrapv"),
    *("-Wall", "-Wextra", "-Wno-psabi"),
]
# Spurious in GCC's own AVX512 headers, and unknown to Clang: https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593
GCC_FLAGS = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
SANITIZE = os.environ.get("LPIPS_FAST_SANITIZE") == "1"
SANITIZER_FLAGS = [
    *("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"),
    # What else is undefined shows too: overflow of signed numbers, and what is asserted.
    *("-fno-wrapv", "-UNDEBUG", "-O1", "-g1"),
]
# Messages name files as a reader of the sources knows them, not as they lie here.
PREFIX_MAPS = [
    f"-fmacro-prefix-map={folder}/=" for folder in (*cpp_extension.include_paths(), str(ROOT))
]
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]


def torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def cuda_decision() -> tuple[Path | None, str]:
    """The toolkit to build the CUDA kernels with, or None; and the reason in words."""
    wish = os.environ.get("LPIPS_FAST_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"LPIPS_FAST_CUDA must be 0, 1 or unset, not {wish!r}")
    if wish == "0":
        return None, "LPIPS_FAST_CUDA=0"
    home = cuda_home()
    if home is None or not (home / "bin" / "nvcc").exists():
        where = f"no nvcc in {home}/bin"
        if home is None:
            where = "no nvcc: no CUDA_HOME, none on the PATH, and none of the extra cuda-build"
        if wish == "1":
            sys.exit(f"LPIPS_FAST_CUDA=1 asks for the CUDA kernels, and there is {where}")
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


class Library(Extension):
    """One compiled library: how its sources are compiled, and how it is linked."""

    def __init__(
        self,
        name: str,
        sources: list[str],
        compile_command: list[str],
        link_command: list[str],
        libraries: list[str],
        tools: str,
        flags_of: dict[str, list[str]] | None = None,
    ) -> None:
        super().__init__(f"lpips_fast.kernels.{name}", sources)
        self.compile_command = compile_command
        self.link_command = link_command
        self.link_libraries = libraries
        self.tools = tools
        self.flags_of = flags_of or {}


class Build(cpp_extension.BuildExtension):
    """Torch's build with all libraries as one graph of commands (ninja_build.py).

    Torch's own compiles one library after the other, links them with libtorch_python, which is
    outside the stable ABI, and refuses CUDA sources where torch has no CUDA. Objects stay in build/
    also where setuptools builds in a temporary folder, as for an editable install.
    """

    def finalize_options(self) -> None:
        wished = self.force
        super().finalize_options()  # torch's forces everything where there is ninja
        self.force = wished or self.get_finalized_command("build").force

    def build_extensions(self) -> None:
        # Objects of another torch or Python are not overwritten: who goes back finds them.
        kind = f"torch-{torch.__version__}-{sysconfig.get_config_var('SOABI')}"
        folder = Path(self.get_finalized_command("build").build_base) / "objects" / kind
        if self.force:
            shutil.rmtree(folder, ignore_errors=True)
        compilations, linkings = [], []
        for library in self.extensions:
            name = library.name.split(".")[-1]
            tools = ninja_build.remember_tools(folder / name / "tools", library.tools)
            objects = []
            for source in library.sources:
                target = str(folder / name / (Path(source).stem + ".o"))
                command = [*library.compile_command, *library.flags_of.get(source, [])]
                compilations.append(ninja_build.Compilation(command, source, target, tools))
                objects.append(target)
            linkings.append(
                ninja_build.Linking(
                    library.link_command,
                    objects,
                    library.link_libraries,
                    str(folder / self.get_ext_filename(name)),
                    tools,
                )
            )
        ninja_build.run(folder, compilations, linkings, is_quiet=self.verbose == 0)
        for library, linking in zip(self.extensions, linkings):
            place = Path(self.get_ext_fullpath(library.name))
            place.parent.mkdir(parents=True, exist_ok=True)
            # A process that has the old one loaded keeps it.
            place.unlink(missing_ok=True)
            shutil.copy2(linking.target, place)


def cxx_compiler() -> list[str]:
    """CXX, or c++; one that knows C++20."""
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(command[0]) is None:
        sys.exit(
            f"lpips_fast is compiled, and there is no compiler {command[0]!r}: install one for "
            "C++20 (GCC 10, Clang 14 or later), name it in CXX, or install a wheel"
        )
    probe = "#if __cplusplus <= 201703L\n#error\n#endif\n#include <concepts>\n"
    options = ["-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run([*command, *options], input=probe, text=True, capture_output=True).returncode:
        sys.exit(
            f"lpips_fast needs a compiler for C++20 (GCC 10, Clang 14 or later), and {command[0]} "
            f"is {compiler_version(command)}: name another in CXX"
        )
    return command


def compiler_version(command: list[str]) -> str:
    run = subprocess.run([*command, "--version"], capture_output=True, text=True)
    return run.stdout.splitlines()[0] if run.stdout else command[0]


def environment_flags(*names: str) -> list[str]:
    return [flag for name in names for flag in shlex.split(os.environ.get(name, ""))]


def tools_of(*descriptions: str) -> str:
    """What a command does not name and yet makes another file of the same source."""
    names = [*("CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "MACOSX_DEPLOYMENT_TARGET")]
    names += ["NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"]
    return "\n".join([*descriptions, *(f"{name}={os.environ.get(name, '')}" for name in names)])


def cpp_library(
    compiler: list[str],
    name: str,
    sources: list[str],
    flags: list[str],
    flags_of: dict[str, list[str]] | None = None,
) -> Library:
    is_mac = sys.platform == "darwin"
    is_clang = "clang" in compiler_version(compiler)
    sanitizer = SANITIZER_FLAGS if SANITIZE else []
    machine = environment_flags("ARCHFLAGS") if is_mac else []
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if is_mac else ["-shared"]
    return Library(
        name,
        sources,
        # Torch's headers as system headers: warnings are for our own code.
        [
            *(*compiler, *CXX_FLAGS, *machine, *PREFIX_MAPS),
            *([] if is_clang else GCC_FLAGS),
            *(f"-isystem{path}" for path in cpp_extension.include_paths()),
            *(*flags, *sanitizer, *environment_flags("CPPFLAGS", "CXXFLAGS")),
        ],
        [*compiler, *shared, *machine, *sanitizer, *environment_flags("LDFLAGS")],
        [
            *(f"-L{path}" for path in cpp_extension.library_paths()),
            *("-lc10", "-ltorch_cpu", *([] if is_mac else ["-ldl"])),  # glibc before 2.34
        ],
        tools_of(compiler_version(compiler)),
        flags_of,
    )


def cuda_library(compiler: list[str], toolkit: Path, gencode: list[str]) -> Library:
    """By nvcc, without torch's own demand for a CUDA build of torch."""
    nvcc = str(toolkit / "bin" / "nvcc")
    folders = [path for name in ("lib64", "lib") if (path := toolkit / name).is_dir()]
    return Library(
        "_cuda",
        CUDA_SOURCES,
        [
            *(nvcc, *NVCC_FLAGS, *gencode, "-DUSE_CUDA"),
            *(f"-Xcompiler={flag}" for flag in PREFIX_MAPS),
            *(f"-isystem={path}" for path in cpp_extension.include_paths()),
        ],
        [nvcc, "-shared", "-cudart=static"],
        # libtorch and libtorch_cpu hold the stable ABI's functions; the CUDA runtime is static.
        [
            *(f"-L{path}" for path in (*folders, *cpp_extension.library_paths())),
            *("-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"),
        ],
        tools_of(nvcc_output(toolkit, "--version"), compiler_version(compiler)),
    )


def extensions() -> list[Extension]:
    if torch_version() < MINIMUM_TORCH:
        sys.exit(
            f"lpips_fast needs torch 2.10 or later (for its stable ABI), found {torch.__version__}"
        )
    compiler = cxx_compiler()
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
        "compiler": compiler_version(compiler),
        "cpu_capabilities": ", ".join(capabilities),
        "cuda": reason,
        "cuda_arch_list": arch_list,
        "nvcc": nvcc,
    }
    # The longest first, so that no core waits for them at the end.
    result = []
    if toolkit:
        result.append(cuda_library(compiler, toolkit, gencode_flags(arch_list)))
    cpu_sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp"))
    for capability, flags in capabilities.items():
        macro = capability.upper()
        defines = [f"-DCPU_CAPABILITY={macro}", f"-DCPU_CAPABILITY_{macro}=1"]
        flags_of_all = ["-ffp-contract=off", *flags.split(), *defines]
        result.append(cpp_library(compiler, f"_cpu_{capability}", cpu_sources, flags_of_all))
    module = "csrc/python_module.cpp"
    python = {sysconfig.get_path(name) for name in ("include", "platinclude")}
    of_module = [f"-isystem{path}" for path in (pybind11_include(), *sorted(python))]
    of_module.append(f"-DLPIPS_FAST_BUILD_INFO={json.dumps(json.dumps(info))}")
    result.append(cpp_library(compiler, "_C", ["csrc/ops.cpp", module], [], {module: of_module}))
    return result


setup(
    ext_modules=extensions(), cmdclass={"build_ext": Build.with_options(no_python_abi_suffix=False)}
)
