"""The order of the package, as its imports show it: arrows run one way, and no circle is closed."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import declare_torchvision_operators

import lpips_fast

ROOT = Path(lpips_fast.__file__).parent

#: From the bottom up: a file or folder imports from lines above its own and from its own folder.
LAYERS = [
    "version",
    "normalization",
    "composed",
    "kernels",
    "trunk",
    "weights",
    "features fidelity pretrained_networks",
    "notices many_images",
    "inputs",
    "functional",
    "comparison",
    "images",
    "compat",
    "lpips",
    "pairs",
    "metrics pyiqa_metric folders analysis choice info compare_images",
    "judgements export evaluate_folders report compression",
    "trainer",
    "pairwise plots training",  # doors at the paths of 0.1
    "__init__",  # the public names
    "cli",
    "__main__",
]
RANK = {name: rank for rank, line in enumerate(LAYERS) for name in line.split()}

#: What a lower layer opens late, for a method that stands on a higher one.
DOORS = {("many_images", "pairs.all_pairs"), ("many_images", "pairs.embedding")}


class Import(NamedTuple):
    module: str  # that imports, without the package's name
    target: str
    line: int


@functools.cache
def modules() -> dict[str, Path]:
    """Every file by its dotted name below the package, which itself is ``__init__``."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        found[".".join(parts)] = path
    return found


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes_at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if is_for_types(child):
            for other in child.orelse:  # type: ignore[attr-defined]
                yield other
                yield from nodes_at_run_time(other)
        else:
            yield child
            yield from nodes_at_run_time(child)


def imports_of(module: str) -> Iterator[Import]:
    """What a file imports of the package, in functions too, but for types alone."""
    path = modules()[module]
    package = ["lpips_fast", *path.relative_to(ROOT).parts[:-1]]
    for node in nodes_at_run_time(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            names = [f"{'.'.join(base)}.{alias.name}" for alias in node.names]
            if base[-1] == "_C":
                continue  # names of a compiled library
        else:
            continue
        for name in names:
            if "kernels._" in name:
                continue  # a compiled library
            if name != "lpips_fast" and not name.startswith("lpips_fast."):
                continue
            target = name.removeprefix("lpips_fast").removeprefix(".")
            while target and target not in modules():  # a name in a module
                target = target.rpartition(".")[0]
            yield Import(module, target or "__init__", node.lineno)


@functools.cache
def all_imports() -> list[Import]:
    return [found for module in modules() for found in imports_of(module)]


def folder_of(module: str) -> str:
    return module.partition(".")[0]


def test_imports_are_found():
    """The test itself: absolute, relative, late, and of a name in a module."""
    found = {(i.module, i.target) for i in all_imports()}
    assert ("many_images", "pairs.all_pairs") in found  # late
    assert ("kernels", "kernels.distance") in found
    assert ("trunk.slices", "trunk.convolution") in found
    assert ("__init__", "functional") in found
    assert len(found) > 100


def test_every_file_has_its_place():
    unknown = {folder_of(module) for module in modules()} - RANK.keys()
    assert not unknown, f"add {sorted(unknown)} to LAYERS, where its imports allow"
    gone = RANK.keys() - {folder_of(module) for module in modules()}
    assert not gone, f"{sorted(gone)} are no more"


def test_arrows_run_one_way():
    wrong = []
    for module, target, line in all_imports():
        lower, upper = folder_of(target), folder_of(module)
        if lower != upper and RANK[lower] >= RANK[upper] and (module, target) not in DOORS:
            wrong.append(f"{modules()[module].relative_to(ROOT)}:{line} imports {target}")
    assert not wrong, "against the order of LAYERS:\n" + "\n".join(wrong)


def test_doors_are_opened_late():
    """And are there: a door that nobody opens is no door."""
    assert {(i.module, i.target) for i in all_imports()} >= DOORS
    for module, target in DOORS:
        tree = ast.parse(modules()[module].read_text())
        at_import = {ast.unparse(node) for node in tree.body}
        assert not any(
            target.rpartition(".")[2] in line for line in at_import if "import" in line[:30]
        )


def test_no_circles():
    """File by file, so that none stands within a folder either."""
    arrows: dict[str, set[str]] = {module: set() for module in modules()}
    for module, target, _ in all_imports():
        # A folder's __init__ takes its names from its files, which take nothing from it.
        if (module, target) not in DOORS and module != target:
            arrows[module].add(target)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "a circle: " + " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(arrows[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in arrows:
        visit(module, ())


@pytest.mark.parametrize(
    ("upper", "lower"),
    [
        ("trunk", "kernels"),  # kernels know no network
        *((name, "trunk") for name in ("functional", "comparison", "lpips")),
        ("cli", "lpips"),
    ],
)
def test_what_must_not_know_what(upper, lower):
    """Spelled out, should somebody change the order above."""
    assert not [
        i for i in all_imports() if folder_of(i.module) == lower and folder_of(i.target) == upper
    ]


def test_folders_are_two_deep_at_most():
    for path in modules().values():
        assert len(path.relative_to(ROOT.parent).parts) <= 3, path


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in ROOT.glob("*/__init__.py")))
def test_folders_say_what_they_are_and_what_they_offer(folder):
    package = importlib.import_module(f"lpips_fast.{folder}")
    assert package.__doc__ and package.__doc__.strip().endswith((".", "::"))
    assert package.__all__ and len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None


def test_every_module_says_what_it_is():
    for module, path in modules().items():
        assert ast.get_docstring(ast.parse(path.read_text())), module


@pytest.mark.parametrize("module", modules())
def test_every_module_is_imported_alone(module):
    """After the others, that is: in a fresh interpreter it takes a second each."""
    if module == "metrics":
        declare_torchvision_operators()
        pytest.importorskip("torchmetrics", reason="the metric is one of torchmetrics")
    if module == "pyiqa_metric":
        declare_torchvision_operators()
        reason = "the metrics are some of pyiqa"
        pytest.importorskip("pyiqa", reason=reason, exc_type=ImportError)
    if module != "__main__":
        importlib.import_module(f"lpips_fast.{module}".removesuffix(".__init__"))


def test_bottom_and_top_are_imported_alone(run_python):
    for module in ("kernels", "trunk", "weights", "comparison.calls", "pairs.all_pairs", "cli"):
        run_python(f"import lpips_fast.{module}")


_NAMES = """
import lpips_fast

names = dir(lpips_fast)
assert names == sorted(lpips_fast.__all__), "dir() and __all__ differ"
assert len(set(names)) == len(names)
for name in names:
    assert getattr(lpips_fast, name) is not None, name
try:
    lpips_fast.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError("any name is there")
print(len(names))
"""


def test_public_names(run_python):
    """``import lpips_fast`` alone makes every one reachable, and dir() lists them."""
    declare_torchvision_operators()  # for torchmetrics
    pytest.importorskip("torchmetrics", reason="the metric is one of torchmetrics")
    torchvision = (
        inspect.getsource(declare_torchvision_operators) + declare_torchvision_operators.__name__
    )
    code = f"import torch\n{torchvision}()\n{_NAMES}"
    assert int(run_python(code)) == len(lpips_fast.__all__)


def test_what_stands_on_the_metric_is_loaded_late(run_python):
    code = (
        "import lpips_fast, sys; print(*sorted(m for m in sys.modules if m.startswith('lpips_')))"
    )
    loaded = {folder_of(m.removeprefix("lpips_fast.")) for m in run_python(code).split()}
    assert "lpips" in loaded
    late = {"analysis", "choice", "export", "folders", "judgements", "metrics", "pairs", "cli"}
    late |= {"compression"}
    assert not loaded & late


def test_the_package_needs_nothing_optional(run_python):
    code = """
        import sys
        for name in ("torchvision", "torchmetrics", "matplotlib", "PIL", "onnx", "skimage"):
            sys.modules[name] = None
        import lpips_fast
        lpips_fast.LPIPS(pnet_rand=True, verbose=False)
        print("runs")
    """
    assert run_python(code).strip() == "runs"
    assert "lpips_fast" in sys.modules
