"""``lpips-fast dirs A B -o distances.csv``: the distance of every pair of images in two folders."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, get_args

import torch
from tqdm import tqdm

from ..folders.evaluating import Evaluation, FolderGoneError, Row, default_workers
from ..folders.pairing import Match, Pairing, pair_folders
from ..folders.ranks import RankError, Ranks
from ..folders.results import ResultFile
from ..images.resizing import Preprocessing, Resampling
from ..trunk.table import TRUNKS
from ..version import __version__
from ..weights import locate_trunk_weights
from . import argument_types
from .command import Command, CommandError, add_json_argument, print_to, tell
from .image_files import add_alpha_argument
from .model import add_model_arguments, layers_text, load_model, metric_name

if TYPE_CHECKING:
    from ..lpips import LPIPS

# How much is said on standard error of what went wrong; the files and --json have all of it.
_NAMES_TOLD = 5
_FAILURES_TOLD = 20


def _add_dirs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder0", metavar="A", help="a folder of images")
    parser.add_argument("folder1", metavar="B", help="another, with images of the same names")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="CSV",
        help="one row a pair; an interrupted run goes on where this file ends",
    )
    parser.add_argument("--overwrite", action="store_true", help="begin the file again")
    add_model_arguments(parser, all_nets="three columns, for which each image is read once")
    parser.add_argument(
        "--match",
        choices=get_args(Match),
        default="name",
        help="pair equal names (default), or equal names but for the suffix",
    )
    parser.add_argument("--recursive", action="store_true", help="look into sub-folders too")
    parser.add_argument(
        "--resize",
        type=argument_types.size_or_side,
        metavar="WxH|N",
        help="resize to W by H pixels, or the shorter side to N; by default images keep their size",
    )
    parser.add_argument(
        "--crop",
        type=argument_types.size,
        metavar="WxH",
        help="keep the centre, after --resize if both are given",
    )
    parser.add_argument(
        "--resampling",
        choices=get_args(Resampling),
        default="bicubic",
        help="Pillow's filter for --resize (default: bicubic)",
    )
    add_alpha_argument(parser)
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
    add_json_argument(parser)


def _run_dirs(options: argparse.Namespace) -> None:
    with _terminable(), Ranks() as ranks:
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


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """End on SIGTERM as on an error: by saying what is written, and with the shell's exit code."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _nowhere() -> Any:
    return open(os.devnull, "w")


def _load_models(options: argparse.Namespace) -> dict[str, LPIPS]:
    nets = list(TRUNKS) if options.net == "all" else [options.net]
    # Whatever a library prints while it works is not part of the result.
    with contextlib.redirect_stdout(sys.stderr):
        return {
            net: load_model(argparse.Namespace(**{**vars(options), "net": net})) for net in nets
        }


def _evaluation(options: argparse.Namespace, models: dict[str, LPIPS], ranks: Ranks) -> Evaluation:
    workers = options.workers or default_workers(ranks.local_size)
    if options.device.type != "cpu" and not options.workers:
        workers = min(workers, 8)  # they only decode, and a GPU is fed by few
    return Evaluation(
        list(models.values()),
        folders=(options.folder0, options.folder1),
        alpha=options.alpha,
        preprocessing=_preprocessing(options),
        batch=options.batch,
        workers=workers,
    )


def _preprocessing(options: argparse.Namespace) -> Preprocessing:
    return Preprocessing(options.resize, options.crop, options.resampling)


# ------------------------------------------------------------------------------ one rank


def _help(options: argparse.Namespace, models: dict[str, LPIPS], ranks: Ranks) -> None:
    plan: tuple[Pairing, int] | None = ranks.broadcast(None)
    if plan is None:  # rank 0 said why
        sys.exit(1)
    pairing, done = plan
    with _evaluation(options, models, ranks) as evaluation:
        chunks = ranks.share(_chunks_left(evaluation, len(pairing.pairs), done))
        ranks.send(evaluation.rows(pairing.pairs, chunks))


def _chunks_left(evaluation: Evaluation, count: int, done: int) -> list[range]:
    return [chunk for chunk in evaluation.chunks(count) if chunk.stop > done]


def _lead(options: argparse.Namespace, models: dict[str, LPIPS], ranks: Ranks) -> None:
    plan: tuple[Pairing, int] | None = None
    with contextlib.ExitStack() as stack:
        try:
            pairing = _pair(options)
            output = stack.enter_context(_open_output(options, models, pairing))
            plan = (pairing, output.done)
        finally:
            ranks.broadcast(plan)
        if output.done:
            tell("note", f"going on after row {output.done} of {len(pairing.pairs)}")
        try:
            with _evaluation(options, models, ranks) as evaluation:
                _write_rows(evaluation, output, pairing, ranks)
            output.finish()
        except (KeyboardInterrupt, SystemExit):
            tell("note", f"stopped; {_what_is_written(output)}")
            raise
        except (FolderGoneError, RankError) as error:
            raise CommandError(f"{error}; {_what_is_written(output)}") from error
        report = _report(options, models, pairing, output)
    print(json.dumps(report, indent=2, allow_nan=False)) if options.json else _print(
        options, report
    )
    if output.failed:
        raise CommandError(
            f"{len(output.failed)} of {len(pairing.pairs)} pairs could not be measured: see the "
            f"column error of {output.path}"
        )


def _what_is_written(output: ResultFile) -> str:
    return (
        f"{output.done} of {len(output.names)} rows are in {output.path}, and the same command "
        "goes on from there"
    )


def _pair(options: argparse.Namespace) -> Pairing:
    pairing = pair_folders(
        options.folder0, options.folder1, match=options.match, recursive=options.recursive
    )
    for folder, other, names in (
        (options.folder0, options.folder1, pairing.only_in_0),
        (options.folder1, options.folder0, pairing.only_in_1),
    ):
        if names:
            tell("warning", f"without a partner in {other}: {_some(names)} of {folder}")
    if pairing.passed_over:
        tell(
            "warning", f"passed over, for their suffix is no image's: {_some(pairing.passed_over)}"
        )
    hint = ""
    if pairing.pairs_by_stem and options.match == "name":
        hint = f"{pairing.pairs_by_stem} would pair but for their suffixes: --match stem"
    if not pairing.pairs:
        raise CommandError(
            f"{options.folder0} and {options.folder1} have no image in common"
            + (f"; {hint}" if hint else "" if options.recursive else "; see --recursive")
        )
    if hint:
        tell("note", hint)
    return pairing


def _some(names: list[str]) -> str:
    more = len(names) - _NAMES_TOLD
    return ", ".join(names[:_NAMES_TOLD]) + (f", and {more} more" if more > 0 else "")


def _open_output(
    options: argparse.Namespace, models: dict[str, LPIPS], pairing: Pairing
) -> ResultFile:
    if not options.output.parent.is_dir():
        raise CommandError(f"cannot write {options.output}: its folder does not exist")
    columns = [f"distance_{net}" for net in models] if options.net == "all" else ["distance"]
    return ResultFile(
        options.output,
        _header(options, models, pairing),
        columns,
        [pair.name for pair in pairing.pairs],
        overwrite=options.overwrite,
    )


def _write_rows(evaluation: Evaluation, output: ResultFile, pairing: Pairing, ranks: Ranks) -> None:
    chunks = _chunks_left(evaluation, len(pairing.pairs), output.done)
    own = evaluation.rows(pairing.pairs, ranks.share(chunks))
    bar = tqdm(
        total=2 * len(pairing.pairs),
        initial=2 * output.done,
        unit=" images",
        disable=None,  # where standard error is no terminal
        file=sys.stderr,
    )
    with bar, contextlib.closing(own):
        for chunk, rows in zip(chunks, ranks.gather(own, len(chunks))):
            told = len(output.failed)
            before = output.done
            output.append(rows, chunk.start)
            for row in output.failed[told:_FAILURES_TOLD]:
                with tqdm.external_write_mode(file=sys.stderr):
                    tell("warning", _failure(row))
            bar.update(2 * (output.done - before))
    if len(output.failed) > _FAILURES_TOLD:
        tell("warning", f"and {len(output.failed) - _FAILURES_TOLD} failures more")


def _failure(row: Row) -> str:
    return f"{row.name}: {row.error}"


# ------------------------------------------------------------------------------ what it says


def _header(
    options: argparse.Namespace, models: dict[str, LPIPS], pairing: Pairing
) -> dict[str, str]:
    """How this run measures: of two runs with this header, both make the same file."""
    import PIL

    device, precision = options.device.type, options.dtype
    if device == "cuda":
        device = f"cuda, {torch.cuda.get_device_name(options.device)}"
        if precision == "float32" and torch.backends.cudnn.allow_tf32:
            precision = "float32, convolutions in TF32"
    return {
        "lpips-fast": __version__,
        "torch": torch.__version__,
        "Pillow": PIL.__version__,
        "metric": "baseline (no linear layers)" if options.baseline else "LPIPS",
        "net": ", ".join(models),
        "version": options.version,
        "normalization": options.normalization,
        "layers": layers_text(options),
        **{f"weights of {net}": _weights(options, net, model) for net, model in models.items()},
        "dtype": precision,
        "device": device,
        "batch": str(options.batch),
        **_preprocessing(options).words,
        "alpha": options.alpha,
        "folder A": str(Path(options.folder0)),
        "folder B": str(Path(options.folder1)),
        "sub-folders": "yes" if options.recursive else "no",
        "paired by": options.match,
        "pairs": str(len(pairing.pairs)),
        "only in A": str(len(pairing.only_in_0)),
        "only in B": str(len(pairing.only_in_1)),
    }


def _weights(options: argparse.Namespace, net: str, model: LPIPS) -> str:
    """Which weights a trunk has: their file's name, and a digest that no copying changes."""
    if options.random_trunk:
        source = "random, not LPIPS"
    elif options.weights:
        source = Path(options.weights).name
    else:
        location = locate_trunk_weights(net)
        source = location.path.name if location else "downloaded"
    digest = hashlib.sha256()
    for _, tensor in sorted(model.net.state_dict().items()):
        # As float32, so that float64 has the digest of the float32 that it was made of.
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return f"{source}, SHA-256 of its convolutions {digest.hexdigest()[:16]}"


def _report(
    options: argparse.Namespace, models: dict[str, LPIPS], pairing: Pairing, output: ResultFile
) -> dict[str, Any]:
    return {
        "results": {
            net: {
                "count": statistics.count,
                "mean": statistics.mean,
                "standard_error": statistics.standard_error,
            }
            for net, statistics in zip(models, output.statistics)
        },
        "failed": [{"name": row.name, "error": row.error} for row in output.failed],
        "only_in_a": pairing.only_in_0,
        "only_in_b": pairing.only_in_1,
        "passed_over": pairing.passed_over,
        "output": str(output.path),
        "settings": _header(options, models, pairing),
    }


def _print(options: argparse.Namespace, report: dict[str, Any]) -> None:
    lines = []
    for net, result in report["results"].items():
        mean, error, count = result["mean"], result["standard_error"], result["count"]
        text = "none" if mean is None else f"{mean:.6f}"
        if error is not None:
            text += f" ± {error:.6f} (standard error)"
        label = f"Mean {net}: " if options.net == "all" else "Mean: "
        lines.append(f"{label}{text}, {count} pairs")
    lines.append(f"  {options.folder0}  vs  {options.folder1}")
    lines.append(f"  {metric_name(options)}, {options.device}")
    lines.append(f"  {report['output']}")
    print_to("\n".join(lines), sys.stdout)


COMMAND = Command(
    "measure every pair of images in two folders, into a CSV file", _add_dirs_arguments, _run_dirs
)
