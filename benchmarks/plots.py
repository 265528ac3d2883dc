"""Results as pictures: how many times as fast as ``lpips``, and how far above the convolutions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from goals import OVERHEAD_BOUND, Results, image_size

COLOURS = {"float32": "#3b6fb6", "bfloat16": "#e08a3c"}
MODES = {"forward": "Forward", "step": "Training step"}
Value = Callable[[dict[str, Any]], float | None]


def draw(results: Results, stem: Path) -> dict[str, str]:
    """Writes the plots beside ``stem``; returns the file names by caption."""
    device_type = results["machine"]["device_type"]
    device = results["machine"]["facts"]["Device"]
    bound = OVERHEAD_BOUND[device_type]
    speed = f"Times as fast as lpips 0.1.4 on {device}"
    overhead = f"Time over that of the convolutions alone on {device} (goal: {bound})"
    files = {}
    for caption, name, value, line, label in (
        (speed, "speed", _speed, 1.0, "as fast as lpips"),
        (overhead, "overhead", _overhead, bound, f"goal: {bound}"),
    ):
        file = stem.with_name(f"{stem.name}-{name}.png")
        if _bars(results, value, caption, line, label, file):
            files[caption] = file.name
    return files


def _speed(case: dict[str, Any]) -> float | None:
    return case["times_as_fast_as"].get("lpips")


def _overhead(case: dict[str, Any]) -> float | None:
    return case.get("overhead")


def _bars(
    results: Results, value: Value, title: str, line: float, line_label: str, file: Path
) -> bool:
    """Two panels, forward and step, of horizontal bars; False where there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {}
    for mode in MODES:
        cases = [c for c in results["cases"] if c["mode"] == mode and c["variant"] == "plain"]
        panels[mode] = [(c, v) for c in cases if (v := value(c)) is not None]
    rows = max(map(len, panels.values()), default=0)
    if rows == 0:
        return False
    figure, axes = plt.subplots(
        1, len(panels), figsize=(11, 1.3 + 0.27 * rows), layout="constrained", squeeze=False
    )
    largest = max(v for bars in panels.values() for _, v in bars)
    for axis, (mode, bars) in zip(axes[0], panels.items()):
        positions, labels, last = [], [], None
        for case, _ in bars:
            gap = 0.6 if last not in (None, case["net"]) else 0.0
            positions.append((positions[-1] if positions else -1.0) + 1 + gap)
            labels.append(f"{case['net']} {image_size(case)}")
            last = case["net"]
        colours = [COLOURS[case["dtype"]] for case, _ in bars]
        axis.barh(positions, [v for _, v in bars], color=colours, height=0.8)
        for position, (_, v) in zip(positions, bars):
            axis.text(
                v + 0.01 * largest,
                position,
                f"{v:.2f}",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
        axis.axvline(line, color="black", linewidth=1, linestyle="--")
        axis.set_yticks(positions, labels, fontsize=8)
        axis.set_xlim(0, largest * 1.12)
        axis.margins(y=0.01)
        axis.invert_yaxis()
        axis.set_title(MODES[mode], fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    dtypes = {case["dtype"] for bars in panels.values() for case, _ in bars}
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=colour, label=dtype)
        for dtype, colour in COLOURS.items()
        if dtype in dtypes
    ]
    handles.append(plt.Line2D([], [], color="black", linestyle="--", label=line_label))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return True
