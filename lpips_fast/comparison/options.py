"""The words that a model is made with: which there are, which go together, how they are said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from ..normalization import LEARNED, check_model_normalization, depends_on_batch
from ..trunk import architecture

if TYPE_CHECKING:
    from ..lpips import LPIPS

Net = Literal["alex", "vgg", "vgg16", "squeeze"]
Version = Literal["0.0", "0.1"]
Reduction = Literal["none", "mean", "sum"]


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a word that is not among those there are."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; expected one of {', '.join(choices)}")


def check_options(model: LPIPS) -> None:
    """Refuses what is unknown, and what does not go together."""
    check_choice("version", model.version, get_args(Version))
    check_choice("reduction", model.reduction, get_args(Reduction))
    if model.max_batch is not None and model.max_batch < 1:
        raise ValueError(f"max_batch must be at least 1, got {model.max_batch}")
    if model.frozen and model.pnet_tune:
        raise ValueError(
            "frozen=True keeps all weights, but pnet_tune=True lets the trunk learn; "
            "pass one of the two"
        )
    normalization = check_model_normalization(model.normalization)
    if normalization == LEARNED and not model.lpips:
        raise ValueError(
            "normalization='learned' learns beside the linear weights, and lpips=False has "
            "none: pass one of the two"
        )
    if model.max_batch is not None and depends_on_batch(normalization):
        raise ValueError(
            f"normalization={normalization!r} takes a batch as a whole, which max_batch "
            "divides: pass one of the two"
        )


def announce(model: LPIPS) -> None:
    """Prints what is set up, as ``lpips`` does."""
    print(
        f"Setting up [{'LPIPS' if model.lpips else 'baseline'}] perceptual loss: "
        f"trunk [{model.pnet_type}], v[{model.version}], "
        f"spatial [{'on' if model.spatial else 'off'}]"
        + (f", normalization [{model.normalization}]" if model.normalization != "l2" else "")
        + (f", layers {list(model.layers)}" if model._chosen_layers is not None else "")
    )


def net_in_words(model: LPIPS) -> str:
    """As it was asked for; a narrow trunk's name where it is one."""
    is_narrow = model.net_name != architecture(model.net_name)
    return model.net_name if is_narrow else model.pnet_type


def in_words(model: LPIPS) -> str:
    """How the number is made, for ``repr(model)``."""
    return (
        f"net={net_in_words(model)!r}, version={model.version!r}, lpips={model.lpips}, "
        f"normalization={model.normalization!r}"
        + (f", layers={model.layers}" if len(model.layers) < model.L else "")
    )
