"""What a checkpoint holds for LPIPS, whatever was put around it.

A trunk's convolutions are ``features.N.weight`` in torchvision's files and ``net.sliceK.N.weight``
in those of LPIPS, with the same N; the linear weights are ``linK.model.1.weight``. Training code
puts more in front of them: dictionaries in dictionaries (``state_dict``, ``model``, ``params``,
``generator``), the module that holds the loss (``loss.perceptual.``), and wrappers (``module.``,
``_orig_mod.``). All of it is a prefix here: nested dictionaries are flattened with dots, wrappers
are left out, and keys with the same rest of a prefix belong together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..trunk.table import feature_shapes, name_by_shapes, tap_channels, trunk_spec
from .errors import WeightsError
from .sources import TRUNK_SOURCES, listed

#: The names by which modules that wrap another one hold it.
WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
)

# Dictionaries in dictionaries no deeper than this, so that one that holds itself ends too.
_DEPTH = 6

_FEATURE = re.compile(
    r"(?P<prefix>(?:.+?\.)??)(?:features|(?:net\.)?slice\d+)\."
    r"(?P<name>\d+\.(?:\w+\.)?(?:weight|bias))"
)
_LIN = re.compile(r"(?P<prefix>(?:.+?\.)??)(?:lin|lins\.)(?P<layer>\d+)\.model\.[01]\.weight")
_SLICE = re.compile(r"(?P<prefix>(?:.+?\.)??)net\.slice\d+\..+")
_NORM = re.compile(r"(?P<prefix>(?:.+?\.)??)norms\.\d+\.(?:log_scale|shift)")
_OF_LPIPS = re.compile(r"(?:lin\d+|lins\.\d+|norms\.\d+|net|scaling_layer|features)\..+")


def trunk_features(state: object, net: str, origin: str) -> dict[str, Tensor]:
    """The convolutions of a trunk in a checkpoint, under torchvision's names.

    Args:
        state: a state dict, or dictionaries that hold one.
        net: 'alex', 'vgg' or 'squeeze'.
        origin: what the checkpoint is called in an error's message.

    Returns:
        ``features.N.weight`` and ``features.N.bias``: fresh, contiguous, float32, on the CPU. Their
        widths are those of the checkpoint: :func:`lpips_fast.trunk.name_by_shapes` names the trunk.

    Raises:
        WeightsError: they are missing, of another shape, no plain dense tensors, not finite, or
            there are several that differ.
    """
    return _trunk_features(_flat(state, f"the {net!r} trunk", origin), net, origin)[1]


def trunk_and_linear_weights(
    state: object, net: str, origin: str
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """:func:`trunk_features`, and the linear weights that lie beside them, or ``None``.

    The linear weights are named as those of :func:`lpips_fast.weights.load_lin_weights`; what a
    learned normalisation learned with them is among them, ``norms.K.log_scale`` and so on.
    """
    flat = _flat(state, f"the {net!r} trunk", origin)
    prefix, features = _trunk_features(flat, net, origin)
    narrow = name_by_shapes(net, {name: value.shape for name, value in features.items()})
    return features, _linear_weights(flat, narrow, origin, prefix)


def narrow_name(state: Mapping[str, Tensor], net: str) -> str:
    """The name of the trunk in the state dict of an LPIPS module: a narrow one's, or ``net``.

    Args:
        state: of :func:`lpips_state_dict`.
    """
    shapes = {}
    for key, value in state.items():
        if match := _FEATURE.fullmatch(key):
            shapes[f"features.{match['name']}"] = tuple(value.shape)
    return name_by_shapes(net, shapes)


def lpips_state_dict(checkpoint: object, net: str, origin: str) -> dict[str, Tensor]:
    """The state dict of an LPIPS module in a checkpoint, with the module's own keys.

    Args:
        checkpoint: what a file of linear weights, of a whole LPIPS, or of a model that holds one
            contains.
        net: the module's trunk.
        origin: what the checkpoint is called in an error's message.

    Returns:
        Those of ``linK.…``, ``lins.K.…``, ``net.sliceK.…`` and ``scaling_layer.…`` that it holds;
        a trunk with torchvision's names is given those of LPIPS.

    Raises:
        WeightsError: it is no state dict, a tensor in it is not plain and finite, or it holds
            several of which the linear weights differ.
    """
    flat = _flat(checkpoint, "LPIPS", origin)
    groups: dict[str, dict[str, Any]] = {}
    for pattern in (_LIN, _SLICE):  # where there are linear weights, they say where LPIPS is
        if not groups:
            for key, value in flat.items():
                if match := pattern.fullmatch(key):
                    groups.setdefault(match["prefix"], {})[key[len(match["prefix"]) :]] = value
    prefix = _the_one(groups, "LPIPS", origin)
    state = {}
    for key, value in flat.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and _OF_LPIPS.fullmatch(name):
            problem = _unfit(value)
            if problem is not None:
                raise WeightsError(f"{origin} cannot be loaded: {key!r} {problem}")
            state[_slice_name(name, net)] = value
    return state


# ---------------------------------------------------------------------------------------------
# Prefixes
# ---------------------------------------------------------------------------------------------


def _flat(state: object, what: str, origin: str) -> dict[str, Any]:
    """Everything in nested dictionaries by its dotted key, without the names of wrappers."""
    if not isinstance(state, Mapping):
        raise WeightsError(
            f"{origin} is no state dict for {what}: it holds a {type(state).__name__}"
        )
    flat: dict[str, Any] = {}
    for key, value in _entries(state, _DEPTH):
        name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        if name not in flat:
            flat[name] = value
        elif not _same(flat[name], value):
            raise WeightsError(
                f"{origin} holds {name!r} twice, with other values as {key!r}: "
                "give the part of it that is meant"
            )
    return flat


def _entries(state: Mapping[Any, Any], depth: int) -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if not isinstance(key, str):
            continue  # an optimizer's state, by number
        if isinstance(value, Mapping):
            if depth:
                yield from ((f"{key}.{rest}", v) for rest, v in _entries(value, depth - 1))
        else:
            yield key, value


def _the_one(groups: Mapping[str, Mapping[str, Any]], what: str, origin: str) -> str:
    """The prefix of the only group, or of the first of several that hold the same values."""
    prefixes = list(groups)
    if not prefixes:
        return ""
    first = groups[prefixes[0]]
    for prefix in prefixes[1:]:
        other = groups[prefix]
        if other.keys() != first.keys() or not all(_same(first[k], other[k]) for k in first):
            raise WeightsError(
                f"{origin} holds the weights of {what} more than once, below "
                f"{listed(prefixes)}, and they differ: give the part of it that is meant"
            )
    return prefixes[0]


def _same(a: object, b: object) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _unfit(a) is None and _unfit(b) is None and torch.equal(a, b)
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


# ---------------------------------------------------------------------------------------------
# The trunk's convolutions
# ---------------------------------------------------------------------------------------------


def _trunk_features(
    flat: Mapping[str, Any], net: str, origin: str
) -> tuple[str, dict[str, Tensor]]:
    """The prefix of the trunk's convolutions, and they themselves."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        if match := _FEATURE.fullmatch(key):
            group, name = groups.setdefault(match["prefix"], {}), f"features.{match['name']}"
            if name in group and not _same(group[name], value):
                raise WeightsError(f"{origin} holds {name!r} twice, the second time as {key!r}")
            group[name] = value

    expected = feature_shapes(net)
    narrow = {prefix: _expected(group, net) for prefix, group in groups.items()}
    whole = {p: g for p, g in groups.items() if _first_problem(g, narrow[p]) is None}
    if not whole:
        # Of several, the one that comes nearest is spoken of.
        nearest = max(groups.values(), key=lambda g: len(g.keys() & expected.keys()), default={})
        raise WeightsError(
            f"{origin} does not hold the weights of the {net!r} trunk: "
            f"{_first_problem(nearest, expected)}{_guess(flat, nearest)}"
        )
    prefix = _the_one(whole, f"the {net!r} trunk", origin)
    return prefix, {name: _plain(whole[prefix][name], name, origin) for name in expected}


def _expected(features: Mapping[str, Any], net: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the narrow trunk that weights are of; of the whole one, where of none."""
    plain = {name: value for name, value in features.items() if _unfit(value, look=False) is None}
    shapes = {name: tuple(value.shape) for name, value in plain.items()}
    return feature_shapes(name_by_shapes(net, shapes))


def _first_problem(
    features: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]
) -> str | None:
    for name, shape in expected.items():
        if name not in features:
            return f"{name!r} is missing"
        problem = _unfit(features[name], shape, look=False)
        if problem is not None:
            return f"{name!r} {problem}"
    surplus = next((name for name in features if name not in expected), None)
    return None if surplus is None else f"{surplus!r} is not part of it"


def _guess(state: Mapping[str, object], features: Mapping[str, Any]) -> str:
    """What the foreign state dict seems to be, to end the error message with."""
    for net in TRUNK_SOURCES:
        if _first_problem(features, feature_shapes(net)) is None:
            return f" (it holds those of {net!r})"
    if not features and any(_LIN.fullmatch(key) for key in state):
        return " (it holds LPIPS's linear weights, which ship with this package)"
    first = next(iter(state), None)
    return " (it is empty)" if first is None else f" (its first key is {first!r})"


def _slice_name(name: str, net: str) -> str:
    """``features.N.…`` as LPIPS calls it, ``net.sliceK.N.…``; any other name as it is."""
    if not name.startswith("features."):
        return name
    last_layers: Sequence[int] = tuple(trunk_spec(net).taps.values())
    layer = name.removeprefix("features.")
    index = int(layer.split(".")[0])
    number = sum(index > last for last in last_layers) + 1
    return f"net.slice{number}.{layer}"


# ---------------------------------------------------------------------------------------------
# Linear weights
# ---------------------------------------------------------------------------------------------


def _linear_weights(
    flat: Mapping[str, Any], net: str, origin: str, trunk_prefix: str
) -> dict[str, Tensor] | None:
    """Those beside the trunk; where there are none, those that lie elsewhere in the checkpoint."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        if match := _LIN.fullmatch(key):
            group, name = groups.setdefault(match["prefix"], {}), f"lin{match['layer']}"
            # With dropout the convolution is `model.1`, without `model.0`; `lins` repeats `lin`.
            name += ".model.1.weight"
            if name in group and not _same(group[name], value):
                raise WeightsError(f"{origin} holds {name!r} twice, the second time as {key!r}")
            group[name] = value
    if not groups:
        return None
    prefix = (
        trunk_prefix if trunk_prefix in groups else _the_one(groups, "the linear layers", origin)
    )
    weights, channels = groups[prefix], tap_channels(net)
    result = {}
    for layer, count in enumerate(channels):
        name = f"lin{layer}.model.1.weight"
        if name not in weights:
            raise WeightsError(
                f"{origin} holds linear weights of some of the {len(channels)} layers and not of "
                f"others: {name!r} is missing"
            )
        problem = _unfit(weights[name], (1, count, 1, 1), look=False)
        if problem is not None:
            raise WeightsError(
                f"{origin} holds no linear weights of the {net!r} trunk: {name!r} {problem}"
            )
        result[name] = _plain(weights[name], name, origin)
    for key, value in flat.items():
        if (match := _NORM.fullmatch(key)) and match["prefix"] == prefix:
            problem = _unfit(value, (1,))
            if problem is not None:
                raise WeightsError(f"{origin} cannot be loaded: {key!r} {problem}")
            name = key.removeprefix(prefix)
            result[name] = _plain(value, name, origin)
    return result


# ---------------------------------------------------------------------------------------------
# Tensors
# ---------------------------------------------------------------------------------------------


def _unfit(value: Any, shape: tuple[int, ...] | None = None, look: bool = True) -> str | None:
    """Why a value is no weight: nothing but a plain tensor with finite values in memory is one."""
    if not isinstance(value, Tensor):
        return f"is {type(value).__name__}, expected a floating-point tensor"
    if value.is_nested:
        return "is a nested tensor, expected a dense one"
    if value.layout != torch.strided:
        return f"is a sparse tensor ({value.layout}), expected a dense one"
    if value.is_meta:
        return "is on the meta device and has no values"
    if not value.is_floating_point():  # complex and quantized ones neither
        return f"is {value.dtype}, expected a floating-point tensor"
    if shape is not None and tuple(value.shape) != shape:
        return f"has shape {tuple(value.shape)}, expected {shape}"
    if look and not _is_finite(value):
        return "holds NaN or infinity"
    return None


def _plain(value: Tensor, name: str, origin: str) -> Tensor:
    """A copy, so that neither a mapped file nor the caller's tensor stays behind it."""
    tensor = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    if not _is_finite(tensor):
        raise WeightsError(f"{origin} cannot be used: {name!r} holds NaN or infinity")
    return tensor


def _is_finite(tensor: Tensor) -> bool:
    # As float32, in which 1e300 is infinite. The sum of finite float32 values is finite as float64,
    # and takes a third of the time of isfinite().all().
    return bool(torch.isfinite(tensor.detach().float().sum(dtype=torch.float64)))
