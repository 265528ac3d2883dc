"""The table of a paper: one line a folder, one column a metric, as Markdown or LaTeX.

A cell is the mean and its standard error. The best mean of a column is bold. Below, if there are
several folders, the paired differences from the first: of every image that both have, one number
less the other. Their standard error is what tells whether two folders differ; those of the means
are larger, for they hold how the images differ among themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from .measures import Column
from .results import Results
from .summary import Statistics

__all__ = ["TABLE_FORMATS", "TableFormat", "table"]

TableFormat = Literal["markdown", "latex"]
TABLE_FORMATS: tuple[str, ...] = get_args(TableFormat)


@dataclass(frozen=True)
class _Cell:
    text: str
    is_bold: bool = False


def table(
    results: Results,
    columns: Sequence[Column],
    format_: TableFormat,
    names: Mapping[str, str] | None = None,
) -> str:
    """One table or two of a run's results.

    Args:
        results: of all rows.
        columns: as in the results.
        format_: of the text.
        names: what to call a folder, where its label is not it.

    Returns:
        Lines without a line break at the end. LaTeX wants the package booktabs.
    """
    folders = results.folders()
    called = {folder: (names or {}).get(folder, folder) for folder in folders}
    by_folder = {folder: results.statistics(folder) for folder in folders}
    best = {column.name: _best(column, by_folder) for column in columns}
    titles = ["", *(f"{c.title} {'↑' if c.higher_is_better else '↓'}" for c in columns), "pairs"]
    lines = [
        [
            _Cell(called[folder]),
            *(_mean(c, by_folder[folder][c.name], folder in best[c.name]) for c in columns),
            _Cell(_counts(by_folder[folder])),
        ]
        for folder in folders
    ]
    write = _markdown if format_ == "markdown" else _latex
    text = write(titles, lines)
    if len(folders) == 1:
        return text
    differences = []
    for folder in folders[1:]:
        of_folder = results.differences(folder, folders[0])
        differences.append(
            [
                _Cell(f"{called[folder]} − {called[folders[0]]}"),
                *(_mean(c, of_folder[c.name], sign="+") for c in columns),
                _Cell(_counts(of_folder)),
            ]
        )
    return f"{text}\n\n{write(['paired difference', *titles[1:]], differences)}"


def _best(column: Column, by_folder: Mapping[str, Mapping[str, Statistics]]) -> set[str]:
    means = {folder: statistics[column.name].mean for folder, statistics in by_folder.items()}
    known = [mean for mean in means.values() if mean is not None]
    if len(means) < 2 or not known:
        return set()
    best = max(known) if column.higher_is_better else min(known)
    return {folder for folder, mean in means.items() if mean == best}


def _mean(column: Column, of: Statistics, is_bold: bool = False, sign: str = "") -> _Cell:
    if of.mean is None:
        return _Cell("—")
    text = f"{of.mean:{sign}.{column.decimals}f}"
    if of.standard_error is not None:
        text += f" ± {of.standard_error:.{column.decimals}f}"
    return _Cell(text, is_bold)


def _counts(statistics: Mapping[str, Statistics]) -> str:
    counts = sorted({s.count for s in statistics.values()})
    return " to ".join(map(str, counts[:1] + counts[1:][-1:]))


def _markdown(titles: Sequence[str], lines: Sequence[Sequence[_Cell]]) -> str:
    rows = [[_markdown_text(title) for title in titles]]
    for line in lines:
        escaped = [(_markdown_text(cell.text), cell.is_bold) for cell in line]
        rows.append([f"**{text}**" if is_bold else text for text, is_bold in escaped])
    widths = [max(len(row[k]) for row in rows) for k in range(len(titles))]
    rule = ["-" * max(3, widths[0]), *("-" * max(2, width - 1) + ":" for width in widths[1:])]
    aligned = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [aligned[0], rule, *aligned[1:]])


def _latex(titles: Sequence[str], lines: Sequence[Sequence[_Cell]]) -> str:
    rows = [" & ".join(_latex_text(title) for title in titles) + r" \\"]
    body = [
        " & ".join(
            rf"\textbf{{{_latex_text(cell.text)}}}" if cell.is_bold else _latex_text(cell.text)
            for cell in line
        )
        + r" \\"
        for line in lines
    ]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(titles) - 1)}}}",
            r"\toprule",
            *rows,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _markdown_text(text: str) -> str:
    for character in r"\|*_`<[":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "±": r"$\pm$",
    "−": "$-$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "—": "---",
}


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
