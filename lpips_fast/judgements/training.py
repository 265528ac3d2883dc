"""Learning LPIPS from human judgements (Zhang et al. 2018, section 3 and appendix).

    model = new_model("alex", "lin")
    trainer = Trainer(model, TwoAFCDataset("dataset/2afc/train/cnn"), TrainingOptions())
    trainer.run("runs/alex")
    LPIPS(net="alex", model_path="runs/alex/model.pth")      # or the original's

The distances of two patches to their reference go through a small network, which predicts what
people choose (:class:`lpips_fast.BCERankingLoss`). After every step the linear weights are
projected onto what a distance allows, w >= 0. While the trunk is frozen (mode ``lin``), it runs
once an image and not once an image and epoch; see :mod:`.cached_triplets`.

Where it departs from the trainer of lpips 0.1.4:

- The projection is of the linear weights alone. The original clamps every 1x1 convolution, so that
  training on SqueezeNet also destroys the weights of its frozen trunk.
- Linear weights are projected before the first step too.
- The reference goes through the trunk once a triplet, not twice.
- With a frozen trunk, dropout acts on channel means. Expectation and variance are those of the
  original's dropout of single positions (:meth:`.CachedTriplets.distances`
  says how and why); ``cache=False`` has the original's, at the price of the trunk in every epoch.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..comparison.linear import linear_weight, project_linear_weights
from ..compat import BCERankingLoss
from ..lpips import LPIPS, Net, Version
from ..normalization import LEARNED, ModelNormalization, depends_on_batch
from ..weights import read_state_dict
from .cached_triplets import CachedTriplets, cache_triplets
from .datasets import load_batches
from .learning_curve import draw_learning_curve
from .run_folder import RunFolder, TrainingError, writing
from .scoring import (
    evaluate_2afc,
    people_agreement,
    require_one_distance,
    triplet_distances,
    two_afc_agreement,
)
from .training_state import check_state

__all__ = [
    "EpochRecord",
    "Initialization",
    "Mode",
    "Trainer",
    "TrainingError",
    "TrainingOptions",
    "new_model",
]

Mode = Literal["lin", "tune", "scratch"]
Initialization = Literal["random", "ones", "pretrained"]

#: Files of a training run, in its folder.
MODEL_FILE = "model.pth"
STATE_FILE = "training_state.pth"
LOG_FILE = "log.csv"
SUMMARY_FILE = "training.json"
CURVE_FILE = "learning_curve.png"

# Seconds between two saves at least: an epoch without the trunk is over before a file is written.
_SAVE_INTERVAL = 10.0


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. The defaults are the paper's.

    Attributes:
        epochs: at the full learning rate.
        decay_epochs: that follow, over which the rate falls linearly towards 0.
        learning_rate: of Adam.
        beta1: of Adam.
        weight_decay: decoupled (AdamW), of the metric's weights, not of the ranking network's.
        batch_size: triplets a step.
        dropout: rate on the squared differences before the linear layers.
        cache: with a frozen trunk, run it once and keep what linear weights can learn from.
        seed: of order, dropout and the ranking network. A seed gives the same bits on one device.
    """

    epochs: int = 5
    decay_epochs: int = 5
    learning_rate: float = 1e-4
    beta1: float = 0.5
    weight_decay: float = 0.0
    batch_size: int = 50
    dropout: float = 0.5
    cache: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("epochs", 0, math.inf),
            ("decay_epochs", 0, math.inf),
            ("learning_rate", 0, math.inf),
            ("weight_decay", 0, math.inf),
            ("batch_size", 1, math.inf),
        ):
            value = getattr(self, name)
            if not low <= value < high:
                raise ValueError(f"{name} is {value}, expected at least {low} and finite")
        for name in ("beta1", "dropout"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}, expected at least 0 and below 1")
        if self.total_epochs < 1:
            raise ValueError("epochs and decay_epochs are both 0: there is nothing to train")

    @property
    def total_epochs(self) -> int:
        return self.epochs + self.decay_epochs

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 1.

        >>> options = TrainingOptions(epochs=2, decay_epochs=2, learning_rate=1)
        >>> [options.rate(epoch) for epoch in (1, 2, 3, 4)]
        [1.0, 1.0, 1.0, 0.5]
        """
        if epoch <= self.epochs:
            return float(self.learning_rate)
        return self.learning_rate * (self.total_epochs - epoch + 1) / self.decay_epochs


@dataclass(frozen=True)
class EpochRecord:
    """One line of the log.

    Attributes:
        epoch: from 1.
        learning_rate: during it.
        loss: mean ranking loss, dropout included.
        train_2afc: mean agreement with people while training, dropout included, in [0, 1].
        seconds: that it took, scoring included; the one figure that no seed repeats.
        validation_2afc: 2AFC score after it, by sub-set, in [0, 1].
    """

    epoch: int
    learning_rate: float
    loss: float
    train_2afc: float
    seconds: float
    validation_2afc: dict[str, float] = field(default_factory=dict)

    @property
    def mean_validation_2afc(self) -> float | None:
        """Mean over the sub-sets, ``None`` if there are none."""
        scores = self.validation_2afc.values()
        return sum(scores) / len(scores) if scores else None


def new_model(
    net: str = "alex",
    mode: Mode = "lin",
    *,
    initialization: Initialization = "random",
    weights: Any = None,
    random_trunk: bool = False,
    version: str = "0.1",
    seed: int = 0,
    normalization: ModelNormalization = "l2",
    layers: Sequence[int] | None = None,
) -> LPIPS:
    """An LPIPS model to be trained.

    Args:
        net: trunk.
        mode: ``'lin'`` learns the linear weights on a frozen trunk, ``'tune'`` the trunk too, from
            its ImageNet weights, ``'scratch'`` the trunk too, from random ones.
        initialization: of the linear weights: ``'random'`` as in the original, ``'ones'`` (the
            paper's baseline), or ``'pretrained'``: the published weights, for data of one's own.
        weights: where the trunk's weights come from, as for :class:`LPIPS`.
        random_trunk: a random trunk in mode ``lin`` or ``tune``, for trying things out.
        version: as for :class:`LPIPS`.
        seed: of what is random; the caller's generator is left alone.
        normalization: as for :class:`LPIPS`.
        layers: as for :class:`LPIPS`; the weights of others do not learn.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(get_args(Mode))}")
    if initialization not in get_args(Initialization):
        raise ValueError(
            f"initialization is {initialization!r}, expected one of "
            f"{', '.join(get_args(Initialization))}"
        )
    with _seeded(seed, 0, torch.device("cpu")):
        model = LPIPS(
            pretrained=initialization == "pretrained",
            net=cast(Net, net),
            version=cast(Version, version),
            pnet_rand=random_trunk or mode == "scratch",
            pnet_tune=mode != "lin",
            normalization=normalization,
            layers=layers,
            verbose=False,
            weights=weights,
        )
    if initialization == "ones":
        for lin in model.lins:
            nn.init.ones_(linear_weight(lin))  # type: ignore[arg-type]
    return model


class Trainer:
    """Trains a model on a 2AFC data set.

    Args:
        model: with linear layers; its trunk learns if it was made with ``pnet_tune=True``. It is
            changed in place, and trained on the device on which it is.
        dataset: :class:`~lpips_fast.judgements.TwoAFCDataset`, or any sequence of such items.
        options: how.
        validation: further data sets by name, scored after each epoch.
        workers: processes that read images.
        progress: show a progress bar.

    Attributes:
        epoch: epochs done.
        history: an :class:`EpochRecord` for each.
        people_2afc: what one more person would reach (:func:`.people_agreement`)
            on the validation sets, or on the training set without any; known after an epoch.
    """

    def __init__(
        self,
        model: LPIPS,
        dataset: Any,
        options: TrainingOptions | None = None,
        *,
        validation: Mapping[str, Any] | None = None,
        workers: int = 0,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.dataset = dataset
        self.options = options = options or TrainingOptions()
        self.validation = dict(validation or {})
        self.workers = workers
        self.progress = progress
        self.epoch = 0
        self.history: list[EpochRecord] = []
        self.people_2afc: float | None = None
        self._bar: tqdm | None = None  # of a whole run
        self.device = model.scaling_layer.shift.device

        require_one_distance(model)
        if not model.lpips:
            raise ValueError("the model is a baseline (lpips=False): it has no linear weights")
        if len(dataset) == 0:
            raise ValueError("the data set is empty: there is nothing to learn from")
        self._set_dropout()
        self._learns_trunk = any(p.requires_grad for p in model.net.parameters())
        self._cached: CachedTriplets | None = None  # made when first needed
        self._cached_validation: dict[str, CachedTriplets] = {}

        with _seeded(options.seed, 0, self.device):
            self.ranking_loss = BCERankingLoss().to(model.scaling_layer.shift)
        self._project()
        metric = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": metric, "weight_decay": options.weight_decay},
                {"params": list(self.ranking_loss.parameters()), "weight_decay": 0.0},
            ],
            lr=options.learning_rate,
            betas=(options.beta1, 0.999),
            fused=True,
        )

    def _set_dropout(self) -> None:
        layers = [m for m in self.model.lins.modules() if isinstance(m, nn.Dropout)]
        if self.options.dropout > 0 and len(layers) < self.model.L:
            raise ValueError(
                "the model was made with use_dropout=False: make it with use_dropout=True, "
                "or train with dropout=0"
            )
        for layer in layers:
            layer.p = self.options.dropout

    # --------------------------------------------------------------------------- one epoch

    @property
    def caches(self) -> bool:
        """Whether epochs are spared the trunk.

        Not where the normalisation learns too, or mixes the images of a batch: then what linear
        weights are given changes from one epoch to the next.
        """
        normalization = self.model.normalization
        is_fixed = normalization != LEARNED and not depends_on_batch(normalization)
        return self.options.cache and is_fixed and not self._learns_trunk

    def train_epoch(self) -> EpochRecord:
        """Train for one more epoch, score the validation sets, and add to :attr:`history`.

        Raises:
            TrainingError: the loss has turned to NaN or infinity.
            JudgementsError, ImageError: the data set cannot be read.
        """
        if self.caches:
            self._fill_cache()
        start = time.perf_counter()
        epoch = self.epoch + 1
        rate = self.options.rate(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # An epoch's randomness is a function of seed and number, so that a run resumed at its
        # beginning needs no generator's state to go on to the same bits.
        with _seeded(self.options.seed, epoch, self.device):
            loss, agreement, people = self._pass_over_the_data(epoch)
        if not math.isfinite(loss):
            raise self._diverged()
        scores = self._score_validation()
        if self.validation:
            people = sum(p for _, p in scores.values()) / len(scores)
        self.people_2afc = people
        validation = {name: score for name, (score, _) in scores.items()}
        seconds = time.perf_counter() - start
        self.epoch = epoch
        self.history.append(EpochRecord(epoch, rate, loss, agreement, seconds, validation))
        return self.history[-1]

    def _pass_over_the_data(self, epoch: int) -> tuple[float, float, float]:
        """Means over the data set: loss, agreement with people, and people's among themselves."""
        self.model.train()
        # Summed where they are computed: reading a number at each step would stall a GPU.
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        if self._bar is not None:
            self._bar.set_description(f"epoch {epoch}/{self.options.total_epochs}")
        for d0, d1, judge in self._distances():
            loss = self._ranking_loss_of(d0, d1, judge)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self._project()
            with torch.no_grad():
                agreement = two_afc_agreement(d0, d1, judge).sum()
                totals += torch.stack((loss * len(judge), agreement, people_agreement(judge).sum()))
            if self._bar is not None:
                self._bar.update(len(judge))
        self.model.eval()
        loss_sum, agreement_sum, people_sum = (totals / len(self.dataset)).tolist()
        return loss_sum, agreement_sum, people_sum

    def _ranking_loss_of(self, d0: Tensor, d1: Tensor, judge: Tensor) -> Tensor:
        try:
            return self.ranking_loss(*(x.view(-1, 1, 1, 1) for x in (d0, d1, judge * 2 - 1)))
        except RuntimeError as error:  # torch's cross-entropy refuses NaN
            prediction = self.ranking_loss.logit
            if torch.isfinite(prediction).all():
                raise
            raise self._diverged() from error

    def _diverged(self) -> TrainingError:
        return TrainingError(
            f"training diverged in epoch {self.epoch + 1}, its loss is no longer a number: try a "
            f"lower learning rate than {self.options.learning_rate:g}"
        )

    def _distances(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(d0, d1, judge) of one batch after the other, in random order, with a graph.

        A batch's distances are computed when it is asked for, by weights as they are then.
        """
        order = torch.randperm(len(self.dataset))
        if self._cached is not None:
            for rows in order.to(self.device).split(self.options.batch_size):
                d0, d1 = self._cached.distances(self._weights(), rows, self.options.dropout)
                yield d0, d1, self._cached.judge[rows]
            return
        for batch in load_batches(
            self.dataset,
            self.options.batch_size,
            order=order.tolist(),
            workers=self.workers,
            device=self.device,
        ):
            d0, d1 = triplet_distances(self.model, batch["ref"], batch["p0"], batch["p1"])
            yield d0, d1, batch["judge"].flatten().to(d0.dtype)

    def _weights(self) -> Tensor:
        return torch.cat([self.model.layer_weight(k) for k in self.model.layers])

    def _project(self) -> None:
        project_linear_weights(self.model)

    # -------------------------------------------------------------------------- validation

    def _score_validation(self) -> dict[str, tuple[float, float]]:
        """2AFC score and people's agreement, by sub-set."""
        results = {}
        for name, dataset in self.validation.items():
            if self.caches:
                cached = self._cached_validation[name]
                with torch.no_grad():
                    d0, d1 = cached.distances(self._weights())
                    score = two_afc_agreement(d0, d1, cached.judge).double().mean().item()
                    people = people_agreement(cached.judge).double().mean().item()
            else:
                result = evaluate_2afc(
                    self.model,
                    dataset,
                    batch_size=self.options.batch_size,
                    workers=self.workers,
                    progress=f"scoring {name}" if self.progress and self._bar is not None else None,
                )
                score, people = result.score, result.people
            results[name] = (score, people)
        return results

    def _fill_cache(self) -> None:
        if self._cached is not None:
            return
        common: dict[str, Any] = {"batch_size": self.options.batch_size, "workers": self.workers}
        self._cached = cache_triplets(
            self.model,
            self.dataset,
            deviations=self.options.dropout > 0,
            progress="trunk, once" if self.progress else None,
            **common,
        )
        for name, dataset in self.validation.items():
            self._cached_validation[name] = cache_triplets(
                self.model,
                dataset,
                deviations=False,
                progress=f"trunk, once: {name}" if self.progress else None,
                **common,
            )

    # ------------------------------------------------------------------------ a whole run

    def run(
        self, folder: str | os.PathLike[str], *, resume: bool = False, curve: bool = True
    ) -> list[EpochRecord]:
        """Train to the end, and leave everything in a folder, written every few seconds.

        ``model.pth`` is the metric, trunk included, for ``LPIPS(model_path=…)`` here and in the
        original; ``training_state.pth`` is what ``resume`` reads; ``log.csv`` and ``training.json``
        hold the history, ``learning_curve.png`` shows it.

        Args:
            folder: made if need be.
            resume: go on with the run that is there. It ends with the same bits as one that was
                never interrupted, on the same device and number of threads.
            curve: draw the learning curve (needs Matplotlib).

        Raises:
            TrainingError: the folder holds a run and ``resume`` is not set, or holds none and it
                is, or holds one of other options, another model or other data; or another run
                writes to it, or it cannot be written to.
        """
        folder = Path(folder)
        state = folder / STATE_FILE
        if resume:
            self.load_state(state)
        elif state.exists():
            raise TrainingError(
                f"{folder} already holds a training run: resume it, or choose another folder"
            )
        with RunFolder(folder) as place:
            self._run(place, curve)
        return self.history

    def _run(self, place: RunFolder, curve: bool) -> None:
        if self.caches:
            self._fill_cache()  # has a bar of its own
        size, epochs = len(self.dataset), self.options.total_epochs
        saved = time.monotonic()
        with tqdm(
            total=epochs * size,
            initial=self.epoch * size,
            unit=" judgements",
            disable=None if self.progress else True,  # None: without a terminal
        ) as self._bar:
            while self.epoch < epochs:
                record = self.train_epoch()
                shown = {"loss": record.loss, "2AFC": record.train_2afc}
                if record.mean_validation_2afc is not None:
                    shown["validation"] = record.mean_validation_2afc
                self._bar.set_postfix({name: f"{value:.4f}" for name, value in shown.items()})
                if self.epoch == epochs or time.monotonic() - saved >= _SAVE_INTERVAL:
                    if self.epoch == epochs:
                        self._bar.set_description("writing")  # the bar is at its end, the work not
                    place.restore()
                    self.save(place.path, curve=curve)
                    saved = time.monotonic()
        self._bar = None

    def save(self, folder: str | os.PathLike[str], *, curve: bool = True) -> None:
        """Write the files that :meth:`run` describes; each appears whole or not at all.

        Raises:
            TrainingError: one cannot be written.
        """
        folder = Path(folder)
        kept = (folder / STATE_FILE).is_file()
        on_cpu = {name: value.cpu() for name, value in self.model.state_dict().items()}
        summary = json.dumps(self._summary(), indent=2, allow_nan=False) + "\n"
        contents = (
            (MODEL_FILE, _saved(on_cpu)),
            (LOG_FILE, self._log_text().encode("utf-8")),
            (SUMMARY_FILE, summary.encode("utf-8")),
        )
        for name, content in contents:
            with writing(folder / name, kept=kept) as file:
                file.write(content)
        if curve and self.history:
            with writing(folder / CURVE_FILE, kept=kept) as file:
                draw_learning_curve(
                    self.history,
                    file,
                    "png",
                    title=f"LPIPS {self.model.pnet_type}, {len(self.dataset)} judgements",
                    decay_from=self.options.epochs + 1 if self.options.decay_epochs else None,
                    people=self.people_2afc,
                )
        # Last: while it is there, the files above are those of its epoch or of the next.
        with writing(folder / STATE_FILE, kept=kept) as file:
            file.write(_saved(self._state()))

    def _summary(self) -> dict[str, Any]:
        return {
            "net": self.model.pnet_type,
            "version": self.model.version,
            "learns": "trunk and linear weights" if self._learns_trunk else "linear weights",
            "trunk": "random" if self.model.pnet_rand else "pretrained",
            "normalization": self.model.normalization,
            "layers": list(self.model.layers),
            "judgements": len(self.dataset),
            "options": dataclasses.asdict(self.options),
            "people_2afc": self.people_2afc,
            "history": [dataclasses.asdict(record) for record in self.history],
        }

    def _log_text(self) -> str:
        names = list(self.validation)
        head = ["epoch", "learning_rate", "loss", "train_2afc", "validation_2afc", "seconds"]
        text = io.StringIO(newline="")
        rows = csv.writer(text)
        rows.writerow(head + [f"2afc:{name}" for name in names])
        for record in self.history:
            row: list[float | None] = [getattr(record, name) for name in head[:4]]
            row += [record.mean_validation_2afc, record.seconds]
            row += [record.validation_2afc.get(name) for name in names]
            rows.writerow("" if value is None else f"{value:.7g}" for value in row)
        return text.getvalue()

    # ------------------------------------------------------------------------------- resume

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        """What has to be the same for a run to be resumed."""
        return {
            "net": self.model.pnet_type,
            "version": self.model.version,
            "normalization": self.model.normalization,
            "layers": self.model.layers,
            "learns_trunk": self._learns_trunk,
            "judgements": len(self.dataset),
            "data": getattr(self.dataset, "fingerprint", None),
            **dataclasses.asdict(self.options),
            "frozen_weights": self._frozen_digest(),
        }

    def _frozen_digest(self) -> str:
        digest = hashlib.sha256()
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _learned(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}

    def _state(self) -> dict[str, Any]:
        return {
            "identity": self._identity,
            "epoch": self.epoch,
            "learned": self._learned(),
            "ranking_loss": self.ranking_loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "people_2afc": self.people_2afc,
            "history": [dataclasses.asdict(record) for record in self.history],
        }

    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Go on from the state that :meth:`save` wrote.

        Raises:
            TrainingError: there is none, or it is of a run with other options, model or data, or
                does not hold what it should. The run stays as it was.
            WeightsError: the file cannot be read.
        """
        path = Path(path)
        if not path.is_file():
            raise TrainingError(f"there is no training run to resume: {path} does not exist")
        state = read_state_dict(path)
        if not isinstance(state, Mapping) or not isinstance(state.get("identity"), Mapping):
            raise TrainingError(f"{path} is not the state of a training run")
        for name, now in self._identity.items():
            then = state["identity"].get(name)
            if isinstance(then, Tensor) or then != now:
                raise TrainingError(f"{path.parent} cannot be resumed: {_other(name, then, now)}")
        try:
            check_state(
                state,
                learned=self._learned(),
                ranking_loss=self.ranking_loss.state_dict(),
                optimizer=self.optimizer,
                total_epochs=self.options.total_epochs,
            )
        except ValueError as error:
            raise TrainingError(
                f"{path} is damaged, {error}: bring back a copy of it, or begin again in another "
                "folder"
            ) from error
        with torch.no_grad():
            for name, parameter in self._learned().items():
                parameter.copy_(state["learned"][name])
        self.ranking_loss.load_state_dict(state["ranking_loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = state["epoch"]
        self.people_2afc = state["people_2afc"]
        self.history = [EpochRecord(**record) for record in state["history"]]


def _other(name: str, then: Any, now: Any) -> str:
    if name == "frozen_weights":
        return "it began with other weights of the trunk"
    if name == "data":
        return "it began with other judgements"
    return f"it began with {name}={then!r}, and now it is {now!r}"


@contextlib.contextmanager
def _seeded(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Random numbers by seed and epoch inside, the caller's generators untouched outside."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed * 1_000_003 + epoch)
        yield


def _saved(content: Any) -> bytes:
    """As ``torch.save`` writes it. To a file it tells of a full disk in words of its own."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()
