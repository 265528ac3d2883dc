"""``lpips-fast dirs A B -o scores.csv``: every pair of images of two folders, or of several."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ..folders.evaluating import Evaluation, FolderGoneError, Row, default_workers
from ..folders.measures import PSNR, SSIM, Distance, Measure
from ..folders.pairing import Pair, Pairing, Patterns, pair_several, read_pairs, with_masks
from ..folders.ranks import RankError, Ranks
from ..folders.results import ResultFile, Results, ResultStream, record_path
from ..folders.summary import Statistics
from ..folders.tables import TABLE_FORMATS, table
from ..trunk.table import TRUNKS
from ..version import __version__
from . import argument_types
from .command import Command, CommandError, UsageError, add_json_argument, print_to, tell
from .image_files import (
    add_image_arguments,
    add_mask_arguments,
    mask_text,
    masking,
    preprocessing,
)
from .model import (
    add_model_arguments,
    layers_text,
    load_model,
    metric_name,
    random_trunk_warning,
    weights_text,
)
from .outputs import check_output
from .progress import progress_bar
from .report import add_report_argument, check_report, how_made, write_report
from .spellings import as_options

if TYPE_CHECKING:
    from ..lpips import LPIPS

# How much is said on standard error of what went wrong; the files and --json have all of it.
_NAMES_TOLD = 5
_FAILURES_TOLD = 20


def _add_dirs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="*",
        metavar="DIR",
        help="A B: images of A with those of the same names in B; A B C …: with those of several",
    )
    parser.add_argument(
        "--pairs",
        type=Path,
        metavar="CSV",
        help="instead of folders: a file with columns a and b (paths from where it lies), and if "
        "you like name and mask",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=argument_types.csv_path,
        required=True,
        metavar="CSV",
        help="one row a pair, and beside it CSV.jsonl, by which an interrupted run goes on; "
        "-: standard output, and no going on",
    )
    parser.add_argument("--overwrite", action="store_true", help="begin the file again")
    parser.add_argument(
        "--metrics",
        type=argument_types.metrics,
        default=("lpips",),
        metavar="lpips,psnr,ssim",
        help="the columns, in this order (default: lpips)",
    )
    parser.add_argument("--per-layer", action="store_true", help="a column for each layer too")
    parser.add_argument(
        "--table",
        choices=TABLE_FORMATS,
        help="print mean and standard error as the table of a paper, with paired differences",
    )
    add_model_arguments(parser, all_nets="a column for each, for which images are read once")
    parser.add_argument(
        "--match",
        type=argument_types.match,
        default="name",
        metavar="name|stem|PATTERN PATTERN",
        help="pair equal names (default), equal names but for the suffix, or names in which {} "
        'stands for the same text, as "{}_gt.png" "{}_pred.jpg"',
    )
    parser.add_argument("--recursive", action="store_true", help="look into sub-folders too")
    add_image_arguments(parser)
    add_mask_arguments(parser, of_folders=True)
    parser.add_argument(
        "--batch",
        type=argument_types.positive,
        metavar="N",
        help="measure at most N pairs of one size at once (default: 16, on a GPU 64)",
    )
    parser.add_argument(
        "--workers",
        type=argument_types.positive,
        metavar="N",
        help="threads that read images, and on a CPU compute (default: one a core)",
    )
    add_report_argument(parser, "all numbers, the worst pairs with pictures and maps")
    add_json_argument(parser)


def _run_dirs(options: argparse.Namespace) -> None:
    _check_usage(options)
    check_report(options, ())  # what it needs is there, before weights are loaded
    with Ranks() as ranks:
        # Only rank 0 speaks; what stops another rank travels as an exception.
        with contextlib.ExitStack() as quiet:
            if ranks.rank > 0:
                quiet.enter_context(contextlib.redirect_stderr(quiet.enter_context(_nowhere())))
            options.device = ranks.device(options.device)
            options.batch = options.batch or (16 if options.device.type == "cpu" else 64)
            models = _load_models(options)
        if ranks.rank > 0:
            _help(options, models, ranks)
        else:
            _lead(options, models, ranks)


def _check_usage(options: argparse.Namespace) -> None:
    if options.pairs is not None and options.folders:
        raise UsageError("folders and --pairs exclude each other: give one of them")
    if options.pairs is None and len(options.folders) < 2:
        given = f"only {options.folders[0]} is" if options.folders else "none are"
        raise UsageError(
            f"two folders or more are compared, and {given} given: A B, or --pairs CSV; all images "
            "of one folder with each other are compared by lpips-fast pairwise"
        )
    files = [name for name in options.folders if Path(name).is_file()]
    if files and len(files) == len(options.folders):
        raise UsageError(f"{files[0]} is a file: two images are compared by lpips-fast pair A B")
    if options.pairs is None:  # else its column mask is not known yet
        masking(options, has_masks=options.mask is not None)
    elif options.mask is not None and Path(options.mask).is_dir():
        raise UsageError(
            f"{options.mask} is a folder: the masks of --pairs stand in its column mask"
        )
    if options.output is None and (options.json or options.overwrite):
        wrong = "--json" if options.json else "--overwrite"
        raise UsageError(f"with -o - the rows are on standard output: leave out {wrong}")
    if options.json and options.table:
        raise UsageError("--json and --table exclude each other: leave one out")
    if options.per_layer and "lpips" not in options.metrics:
        raise UsageError("--per-layer lists the layers of lpips, which is not among --metrics")


def _nowhere() -> Any:
    return open(os.devnull, "w")


def _load_models(options: argparse.Namespace) -> dict[str, LPIPS]:
    if "lpips" not in options.metrics:
        return {}
    nets = list(TRUNKS) if options.net == "all" else [options.net]
    # Whatever a library prints while it works is not part of the result.
    with contextlib.redirect_stdout(sys.stderr):
        return {
            net: load_model(argparse.Namespace(**{**vars(options), "net": net})) for net in nets
        }


def _measures(options: argparse.Namespace, models: dict[str, LPIPS]) -> list[Measure]:
    measures: list[Measure] = []
    for metric in options.metrics:
        if metric == "lpips":
            measures += [
                Distance(
                    model,
                    f"distance_{net}" if len(models) > 1 else "distance",
                    _title(options, net),
                    per_layer=options.per_layer,
                    mask_mode=options.mask_mode or "weighted",
                    fill_value=options.fill_value or 0.0,
                )
                for net, model in models.items()
            ]
        else:
            measures.append(PSNR() if metric == "psnr" else SSIM())
    return measures


def _title(options: argparse.Namespace, net: str) -> str:
    is_lpips = not (options.baseline or options.random_trunk or options.checkpoint)
    is_lpips = is_lpips and options.normalization == "l2" and options.layers is None
    return f"{'LPIPS' if is_lpips else 'distance'} ({net})"


def _evaluation(options: argparse.Namespace, models: dict[str, LPIPS], ranks: Ranks) -> Evaluation:
    workers = options.workers or default_workers(ranks.local_size)
    if options.device.type != "cpu" and not options.workers:
        workers = min(workers, 8)  # they only decode, and a GPU is fed by few
    return Evaluation(
        _measures(options, models),
        device=options.device,
        folders=options.folders,
        alpha=options.alpha,
        max_pixels=options.max_pixels,
        preprocessing=preprocessing(options),
        batch=options.batch,
        workers=workers,
    )


# ------------------------------------------------------------------------------ one rank


def _help(options: argparse.Namespace, models: dict[str, LPIPS], ranks: Ranks) -> None:
    plan: tuple[list[Pair], list[range]] | None = ranks.broadcast(None)
    if plan is None:  # rank 0 said why
        sys.exit(1)
    pairs, pending = plan
    with _evaluation(options, models, ranks) as evaluation:
        ranks.send(evaluation.rows(pairs, ranks.share(pending)))


def _lead(options: argparse.Namespace, models: dict[str, LPIPS], ranks: Ranks) -> None:
    plan: tuple[list[Pair], list[range]] | None = None
    with contextlib.ExitStack() as stack:
        evaluation = _evaluation(options, models, ranks)
        try:
            pairs, pairings = _pairs(options)
            options.masking = masking(options, has_masks=any(pair.mask for pair in pairs))
            chunks = evaluation.chunks(len(pairs))
            output = stack.enter_context(_open(options, models, evaluation, pairs, chunks))
            pending = output.pending if isinstance(output, ResultFile) else chunks
            plan = (pairs, pending)
        finally:
            ranks.broadcast(plan)
        if isinstance(output, ResultFile):
            _tell_of_earlier_run(output)
        try:
            with evaluation:
                _write_rows(evaluation, output, pending, ranks)
            if isinstance(output, ResultFile):
                output.finish()
        except (KeyboardInterrupt, SystemExit):
            tell("note", f"stopped; {_what_is_written(output)}")
            raise
        except (FolderGoneError, RankError) as error:
            raise CommandError(f"{error}; {_what_is_written(output)}") from error
    if options.report is not None:
        _write_page(options, models, evaluation, output)
    _say(options, models, evaluation, pairings, output)
    not_listed = [name for pairing in pairings for name in pairing.not_listed]
    if output.failed:
        where = f": see the column error of {options.output}" if options.output else ""
        raise CommandError(
            f"{len(output.failed)} of {len(pairs)} pairs could not be measured{where}"
        )
    if not_listed:
        raise CommandError(f"{len(not_listed)} folders could not be looked into")


def _what_is_written(output: Results) -> str:
    told = f"{output.done} of {len(output.pairs)} rows are"
    if not isinstance(output, ResultFile):
        return f"{told} written"
    return f"{told} in {output.path}, and the same command goes on from there"


def _pairs(options: argparse.Namespace) -> tuple[list[Pair], list[Pairing]]:
    if options.pairs is not None:
        pairs = read_pairs(options.pairs)
        if options.mask is not None:
            if any(pair.mask for pair in pairs):
                raise UsageError(f"{options.pairs} has a column mask: leave out --mask")
            pairs = with_masks(pairs, options.mask)
        return pairs, []
    folder0, *folders = options.folders
    pairs, pairings = pair_several(
        folder0, folders, match=options.match, recursive=options.recursive
    )
    hint = ""
    for folder, pairing in zip(folders, pairings):
        for own, other, names in (
            (folder0, folder, pairing.only_in_0),
            (folder, folder0, pairing.only_in_1),
        ):
            if names:
                tell("warning", f"without a partner in {other}: {_some(names)} of {own}")
        if pairing.pairs_by_stem and options.match == "name":
            hint = f"{pairing.pairs_by_stem} would pair but for their suffixes: --match stem"
    passed_over = list(dict.fromkeys(name for p in pairings for name in p.passed_over))
    if passed_over:
        fits = " or do not fit the pattern" if isinstance(options.match, Patterns) else ""
        tell("warning", f"passed over, for they are no image's name{fits}: {_some(passed_over)}")
    for reason in dict.fromkeys(name for p in pairings for name in p.not_listed):
        tell("warning", f"cannot look into {reason}")
    for folder, pairing in zip(folders, pairings):
        if not pairing.pairs:
            raise CommandError(
                f"{folder0} and {folder} have no image in common"
                + (f"; {hint}" if hint else "" if options.recursive else "; see --recursive")
            )
    if hint:
        tell("note", hint)
    if options.mask is not None:
        pairs = with_masks(pairs, options.mask, match=options.match, recursive=options.recursive)
    return pairs, pairings


def _some(names: list[str]) -> str:
    more = len(names) - _NAMES_TOLD
    return ", ".join(names[:_NAMES_TOLD]) + (f", and {more} more" if more > 0 else "")


@contextlib.contextmanager
def _open(
    options: argparse.Namespace,
    models: dict[str, LPIPS],
    evaluation: Evaluation,
    pairs: list[Pair],
    chunks: list[range],
) -> Iterator[Results]:
    columns = [column.name for column in evaluation.columns]
    inputs: list[str | Path] = [p for pair in pairs for p in pair.files]
    inputs = list(dict.fromkeys(inputs))
    others = (options.pairs, options.checkpoint, options.weights)
    inputs += [path for path in others if path is not None]
    check_report(options, inputs)
    if options.output is None:
        yield ResultStream(sys.stdout, columns, pairs)
        return
    for target in (options.output, record_path(options.output)):
        check_output(target, inputs)
    settings = _settings(options, models)
    with ResultFile(
        options.output, settings, columns, pairs, chunks, overwrite=options.overwrite
    ) as output:
        yield output


def _tell_of_earlier_run(output: ResultFile) -> None:
    found = output.found
    if found is None:
        return
    for names, what in (
        (found.changed, "an image changed since, so that they are measured again"),
        (found.gone, "no longer there, so that their rows are gone"),
        (found.new, "new"),
        (found.failed, "they failed, and are tried again"),
    ):
        if names:
            tell("note", f"{what}: {_some(names)}")
    count = len(output.pairs)
    if found.kept == count:
        tell("note", f"nothing to do: all {count} rows are there, and no image changed")
    elif found.kept:
        tell("note", f"going on with {found.kept} of {count} rows")


def _write_rows(
    evaluation: Evaluation, output: Results, pending: list[range], ranks: Ranks
) -> None:
    pairs = output.pairs
    own = evaluation.rows(pairs, ranks.share(pending))
    assert isinstance(output, (ResultFile, ResultStream))
    done = len(pairs) - sum(map(len, pending))
    bar = progress_bar(2 * len(pairs), "images", done=2 * done)
    told = 0
    with bar, contextlib.closing(own):
        for chunk, rows in zip(pending, ranks.gather(own, len(pending))):
            output.append(rows, chunk.start)
            for row in output.failed[told:_FAILURES_TOLD]:
                with tqdm.external_write_mode(file=sys.stderr):
                    tell("warning", as_options(_failure(row)))
            told = len(output.failed)
            bar.update(2 * len(rows))
    if len(output.failed) > _FAILURES_TOLD:
        tell("warning", f"and {len(output.failed) - _FAILURES_TOLD} failures more")


def _failure(row: Row) -> str:
    return f"{f'{row.folder}/' if row.folder else ''}{row.name}: {row.error}"


# ------------------------------------------------------------------------------ the page


def _write_page(
    options: argparse.Namespace,
    models: dict[str, LPIPS],
    evaluation: Evaluation,
    output: Results,
) -> None:
    from ..report.of_folders import PICTURED, page_of_run

    compared = [str(options.pairs)] if options.pairs else options.folders
    count = min(PICTURED, len(output.pairs))
    bar = progress_bar(count, "pairs", label="drawing", leave=False)
    with bar, contextlib.redirect_stdout(sys.stderr):
        page = page_of_run(
            output,
            evaluation,
            title="  vs  ".join(compared),
            subtitle=f"{_metrics_text(options, models)}, {len(output.pairs):,} pairs",
            facts=how_made(options, _settings(options, models)),
            called=_called(options),
            warning=random_trunk_warning(options) if models else "",
            progress=bar.update,
        )
        write_report(options.report, page)


def _metrics_text(options: argparse.Namespace, models: dict[str, LPIPS]) -> str:
    names = {"lpips": metric_name(options), "psnr": "PSNR", "ssim": "SSIM"}
    if len(models) > 1:
        names["lpips"] = metric_name(argparse.Namespace(**{**vars(options), "net": "all trunks"}))
    return "; ".join(names[metric] for metric in options.metrics)


def _called(options: argparse.Namespace) -> dict[str, str]:
    """What to call the one folder that has no label."""
    return {"": Path(options.folders[1]).name} if options.folders else {}


# ------------------------------------------------------------------------------ what it says


def _settings(options: argparse.Namespace, models: dict[str, LPIPS]) -> dict[str, str]:
    """How this run measures: of two runs with these settings, both make the same file."""
    import PIL

    device, precision = options.device.type, options.dtype
    if device == "cuda":
        device = f"cuda, {torch.cuda.get_device_name(options.device)}"
        if precision == "float32" and torch.backends.cudnn.allow_tf32:
            precision = "float32, convolutions in TF32"
    settings = {
        "lpips-fast": __version__,
        "torch": torch.__version__,
        "Pillow": PIL.__version__,
        "metrics": ", ".join(options.metrics),
    }
    if models:
        settings |= {
            "metric": "baseline (no linear layers)" if options.baseline else "LPIPS",
            "net": ", ".join(models),
            "version": options.version,
            "normalization": options.normalization,
            "layers": layers_text(options),
            **{
                f"weights of {net}": weights_text(options, net, model)
                for net, model in models.items()
            },
            "dtype": precision,
        }
    if "ssim" in options.metrics:
        settings["ssim"] = "RGB, 11x11 Gaussian window of sigma 1.5, positions within the image"
    settings |= {
        "device": device,
        "batch": str(options.batch),
        **preprocessing(options).words,
        "alpha": options.alpha,
        "max pixels": str(options.max_pixels),
    }
    if options.masking:
        settings["masks"] = mask_text(options.masking)
        if options.mask is not None:
            settings["mask"] = str(Path(options.mask).resolve())
    if options.pairs is not None:
        return {**settings, "pairs": str(options.pairs.resolve())}
    match = options.match
    patterns = f"{match.pattern0} {match.pattern1}" if isinstance(match, Patterns) else match
    folders = [str(Path(folder).resolve()) for folder in options.folders]
    return {
        **settings,
        "folder A": folders[0],
        **{f"folder {_letter(k)}": folder for k, folder in enumerate(folders[1:], start=1)},
        "sub-folders": "yes" if options.recursive else "no",
        "paired by": patterns,
    }


def _letter(position: int) -> str:
    return chr(ord("A") + position) if position < 26 else str(position + 1)


def _say(
    options: argparse.Namespace,
    models: dict[str, LPIPS],
    evaluation: Evaluation,
    pairings: list[Pairing],
    output: Results,
) -> None:
    # The rows have standard output to themselves.
    stream = sys.stdout if options.output else sys.stderr
    if options.json:
        report = _report(options, models, pairings, output)
        print_to(json.dumps(report, indent=2, allow_nan=False), sys.stdout)
    elif options.table or len(output.folders()) > 1:
        text = table(output, evaluation.columns, options.table or "markdown", _called(options))
        print_to(text, stream)
    else:
        print_to(_words(options, models, evaluation, output), stream)


def _report(
    options: argparse.Namespace,
    models: dict[str, LPIPS],
    pairings: list[Pairing],
    output: Results,
) -> dict[str, Any]:
    first, *others = output.folders()
    summaries = {
        folder: {name: s.summary() for name, s in output.statistics(folder).items()}
        for folder in (first, *others)
    }
    report: dict[str, Any] = {"results": summaries if others else summaries[first]}
    if others:
        report["differences"] = {
            "reference": first,
            **{
                folder: {name: s.summary() for name, s in output.differences(folder, first).items()}
                for folder in others
            },
        }
    labels = dict(zip(output.folders(), pairings))
    partnerless = {
        key: {label: getattr(pairing, attribute) for label, pairing in labels.items()}
        for key, attribute in (("only_in_a", "only_in_0"), ("only_in_b", "only_in_1"))
    }
    return {
        **report,
        "failed": [
            {"name": row.name, **({"folder": row.folder} if others else {}), "error": row.error}
            for row in output.failed
        ],
        **{key: of if others else of.get(first, []) for key, of in partnerless.items()},
        "passed_over": list(dict.fromkeys(name for p in pairings for name in p.passed_over)),
        "not_listed": list(dict.fromkeys(name for p in pairings for name in p.not_listed)),
        "output": str(options.output),
        "record": str(record_path(options.output)),
        "report": None if options.report is None else str(options.report),
        "settings": _settings(options, models),
    }


def _words(
    options: argparse.Namespace,
    models: dict[str, LPIPS],
    evaluation: Evaluation,
    output: Results,
) -> str:
    lines = []
    statistics = output.statistics()
    for column in evaluation.columns:
        of_column = statistics[column.name]
        label = "Mean: " if len(evaluation.columns) == 1 else f"Mean {column.name}: "
        lines.append(f"{label}{_mean_text(of_column)}, {of_column.count} pairs")
        if of_column.count > 1:
            low, median, high = of_column.percentiles(5, 50, 95)
            lines.append(f"  median {median:.6f}, 5th to 95th percentile {low:.6f} to {high:.6f}")
    compared = [str(options.pairs)] if options.pairs else options.folders
    lines.append(f"  {'  vs  '.join(compared)}")
    if models:
        lines.append(f"  {metric_name(options)}, {options.device}")
    if options.masking:
        where = options.mask or f"column mask of {options.pairs}"
        lines.append(f"  mask {where}, {mask_text(options.masking)}")
    lines += [f"  {path}" for path in (options.output, options.report) if path]
    return "\n".join(lines)


def _mean_text(statistics: Statistics) -> str:
    mean, error = statistics.mean, statistics.standard_error
    if mean is None:
        return "none"
    if math.isinf(mean):
        return f"inf (identical: {statistics.infinite})"
    return f"{mean:.6f}" + ("" if error is None else f" ± {error:.6f} (standard error)")


COMMAND = Command(
    "measure images of equal name in two folders or more, into a CSV",
    _add_dirs_arguments,
    _run_dirs,
)
