"""What a checkpoint holds, whatever is around it; and what is no weight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from weight_files import FILENAME, NET, as_checkpoint, assert_same, random_features

import lpips_fast
from lpips_fast.weights import (
    WeightsError,
    load_lin_weights,
    load_trunk_and_linear_weights,
    load_trunk_weights,
    lpips_state_dict,
)

pytestmark = pytest.mark.usefixtures("hub")


def lpips_style(features: Mapping[str, Tensor]) -> dict[str, Any]:
    """A checkpoint of an LPIPS module: every layer below some slice, and other entries."""
    state = {
        name.replace("features.", f"net.slice{1 + index % 7}."): tensor
        for index, (name, tensor) in enumerate(features.items())
    }
    return {"scaling_layer.shift": torch.ones(1, 3, 1, 1), **state}


def below(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{key}": value for key, value in state.items()}


def inside_each(name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """With a wrapper's name before the last part of every key, as layer by layer wrapping has."""
    return {".".join([*k.split(".")[:-1], name, k.split(".")[-1]]): v for k, v in state.items()}


FORMS = {
    "bare": lambda features: features,
    "whole": lambda features: {**features, "classifier.1.bias": torch.ones(10)},
    "data parallel": lambda features: below("module.", features),
    "compiled": lambda features: below("_orig_mod.", features),
    "both": lambda features: below("module._orig_mod.", features),
    "lpips": lpips_style,
    "lpips compiled inside": lambda features: below(
        "_orig_mod.", {k.replace("net.", "net._orig_mod."): v for k, v in features.items()}
    ),
    "FSDP": lambda features: inside_each("_fsdp_wrapped_module", lpips_style(features)),
    "loss": lambda features: below("loss.perceptual.", lpips_style(features)),
    "loss in a wrapped model": lambda features: {
        "generator.0.weight": torch.ones(3),
        **below("module.loss.perceptual._orig_mod.", lpips_style(features)),
    },
    "torchmetrics": lambda features: below("net.", lpips_style(features)),
    **{
        f"in {name!r}": lambda features, name=name: {"epoch": 3, name: lpips_style(features)}
        for name in ("state_dict", "model", "params", "model_state_dict", "generator", "g_ema")
    },
    "training state": lambda features: {
        "step": 7,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "models": {"netG": {"state_dict": below("module.lpips.", lpips_style(features))}},
    },
    "twice the same": lambda features: {
        "model": lpips_style(features),
        "ema": lpips_style({name: value.clone() for name, value in features.items()}),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_trunk(form: str, features: dict[str, Tensor]) -> None:
    assert_same(load_trunk_weights(NET, FORMS[form](features)), features)


def test_result_shares_no_memory_with_what_was_given(features: dict[str, Tensor]) -> None:
    loaded = load_trunk_weights(NET, features)
    name = next(iter(loaded))
    loaded[name].zero_()
    assert bool(features[name].any())


def test_other_dtypes_and_layouts_become_contiguous_float32(features: dict[str, Tensor]) -> None:
    given = {
        name: (value.to(memory_format=torch.channels_last) if value.ndim == 4 else value).double()
        for name, value in features.items()
    }
    loaded = load_trunk_weights(NET, {k: torch.nn.Parameter(v) for k, v in given.items()})
    assert_same(loaded, features)
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in loaded.values())


def test_two_that_differ_are_not_chosen_between(
    features: dict[str, Tensor], generator: torch.Generator
) -> None:
    state = {"model": features, "ema": random_features(generator)}
    with pytest.raises(WeightsError, match=r"more than once, below 'model\.', 'ema\.', and they"):
        load_trunk_weights(NET, state)
    assert_same(load_trunk_weights(NET, state["model"]), features)


# ---------------------------------------------------------------------------------------------
# The trunk and the linear weights in one checkpoint
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def learned(generator: torch.Generator) -> lpips_fast.LPIPS:
    """An LPIPS whose trunk and linear weights are no others'."""
    model = lpips_fast.LPIPS(net=NET, pnet_rand=True, verbose=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(draw.abs() if name.startswith("lin") else draw)
    return model


def assert_same_model(model: lpips_fast.LPIPS, expected: lpips_fast.LPIPS) -> None:
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(state[key], value), key


AROUND = {
    "nothing": lambda state: state,
    "prefix": lambda state: below("module.loss.perceptual.", state),
    "dictionaries": lambda state: {"model": {"state_dict": state}, "epoch": 1},
    "without dropout": lambda state: {
        k.replace("model.1.", "model.0."): v for k, v in state.items()
    },
    "lins alone": lambda state: {k: v for k, v in state.items() if not k.startswith("lin0")},
}


@pytest.mark.parametrize("around", ["nothing", "prefix", "dictionaries", "without dropout"])
@pytest.mark.parametrize("argument", ["weights", "model_path"])
def test_both_are_served(
    around: str, argument: str, learned: lpips_fast.LPIPS, tmp_path: Path
) -> None:
    path = tmp_path / "learned.pth"
    torch.save(AROUND[around](dict(learned.state_dict())), path)
    # For model_path the search must find a trunk first, which the checkpoint then replaces.
    others = {"pnet_rand": True} if argument == "model_path" else {}
    model = lpips_fast.LPIPS(net=NET, **{argument: path}, **others, verbose=False)
    assert_same_model(model, learned)


def test_both_are_served_from_a_mapping_and_the_environment(
    learned: lpips_fast.LPIPS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = dict(learned.state_dict())
    assert_same_model(lpips_fast.LPIPS(net=NET, weights=state, verbose=False), learned)
    torch.save(state, tmp_path / f"{NET}.pth")
    monkeypatch.setenv("LPIPS_FAST_WEIGHTS", str(tmp_path))
    assert_same_model(lpips_fast.LPIPS(net=NET, verbose=False), learned)


def test_torchvision_names_in_a_model_path(
    learned: lpips_fast.LPIPS, features: dict[str, Tensor], tmp_path: Path
) -> None:
    lins = {k: v for k, v in learned.state_dict().items() if k.startswith("lin")}
    torch.save({**features, **lins}, tmp_path / "both.pth")
    model = lpips_fast.LPIPS(
        net=NET, pnet_rand=True, model_path=tmp_path / "both.pth", verbose=False
    )
    expected = lpips_fast.LPIPS(net=NET, weights={**features, **lins}, verbose=False)
    assert_same_model(model, expected)
    assert torch.equal(model.net.slice1[0].weight, features["features.0.weight"])


def test_model_path_is_preferred_to_what_lies_beside_the_trunk(
    learned: lpips_fast.LPIPS, tmp_path: Path
) -> None:
    torch.save(load_lin_weights(NET, "0.0"), tmp_path / "lin.pth")
    model = lpips_fast.LPIPS(
        net=NET,
        weights=dict(learned.state_dict()),
        model_path=tmp_path / "lin.pth",
        verbose=False,
    )
    lin = load_lin_weights(NET, "0.0")["lin0.model.1.weight"]
    assert torch.equal(model.lin0.model[-1].weight, lin)
    assert torch.equal(model.net.slice1[0].weight, learned.net.slice1[0].weight)


def test_linear_weights_that_are_none(features: dict[str, Tensor]) -> None:
    assert load_trunk_and_linear_weights(NET, features)[1] is None
    lins = load_lin_weights(NET, "0.1")
    some = {key: value for key, value in lins.items() if "lin3" not in key}
    with pytest.raises(WeightsError, match=r"some of the 7 layers.*'lin3\.model\.1\.weight' is"):
        load_trunk_and_linear_weights(NET, {**features, **some})
    with pytest.raises(WeightsError, match=r"of the 'squeeze' trunk: 'lin3.* has shape"):
        load_trunk_and_linear_weights(NET, {**features, **load_lin_weights("vgg", "0.1")})
    differing = {key.replace("lin0.", "lins.0."): 2 * value for key, value in lins.items()}
    with pytest.raises(WeightsError, match=r"holds 'lin0\.model\.1\.weight' twice"):
        load_trunk_and_linear_weights(NET, {**features, **lins, **differing})


def test_state_dict_of_lpips_has_its_keys_and_no_others(learned: lpips_fast.LPIPS) -> None:
    state = dict(learned.state_dict())
    given = {
        "model": below("module.loss.", state),
        "discriminator": {"net.0.weight": torch.ones(2)},
        "epoch": 4,
    }
    found = lpips_state_dict(given, NET, "it")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert lpips_state_dict({"conv.weight": torch.ones(2)}, NET, "it") == {}
    with pytest.raises(WeightsError, match="it is no state dict for LPIPS: it holds a list"):
        lpips_state_dict([], NET, "it")
    two = {"a": state, "b": {**state, "lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}}
    with pytest.raises(WeightsError, match=r"more than once, below 'a\.', 'b\.'"):
        lpips_state_dict(two, NET, "it")


# ---------------------------------------------------------------------------------------------
# What is no weight
# ---------------------------------------------------------------------------------------------


def test_weights_of_another_trunk(tmp_path: Path, generator: torch.Generator) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(as_checkpoint(random_features(generator, "alex")))
    with pytest.raises(WeightsError) as error:
        load_trunk_weights(NET, path)
    message = str(error.value)
    assert str(path) in message and "'squeeze' trunk" in message
    assert "'features.0.weight' has shape (64, 3, 11, 11), expected (64, 3, 3, 3)" in message
    assert "it holds those of 'alex'" in message


def test_first_problem_is_named(features: dict[str, Tensor]) -> None:
    name = "features.7.expand3x3.bias"
    cases: list[tuple[dict[str, Any], str]] = [
        ({key: value for key, value in features.items() if key != name}, "is missing"),
        ({**features, name: features[name][1:]}, "has shape (127,), expected (128,)"),
        ({**features, name: features[name].int()}, "is torch.int32, expected a floating-point"),
        ({**features, name: "text"}, "is str, expected a floating-point"),
    ]
    for state, problem in cases:
        with pytest.raises(WeightsError) as error:
            load_trunk_weights(NET, state)
        assert f"{name!r} {problem}" in str(error.value)
    with pytest.raises(WeightsError, match=r"'features\.13\.weight' is not part of it"):
        load_trunk_weights(NET, {**features, "features.13.weight": torch.ones(1)})
    with pytest.raises(WeightsError, match=r"holds 'features\.0\.bias' twice"):
        load_trunk_weights(NET, {**features, "module.features.0.bias": torch.ones(64)})


UNFIT = {
    "complex": (lambda bias: bias.to(torch.complex64), "torch.complex64"),
    "sparse": (lambda bias: bias.to_sparse(), "sparse tensor"),
    "nested": (lambda bias: torch.nested.nested_tensor([bias, bias[:3]]), "nested tensor"),
    "meta": (lambda bias: bias.to("meta"), "meta device"),
    "quantized": (
        lambda bias: torch.quantize_per_tensor(bias, 0.1, 0, torch.qint8),
        "torch.qint8",
    ),
    "bool": (lambda bias: bias > 0, "torch.bool"),
    "NaN": (lambda bias: bias.index_fill(0, torch.tensor(5), float("nan")), "NaN or infinity"),
    "infinity": (lambda bias: bias.index_fill(0, torch.tensor(0), float("inf")), "NaN or infinity"),
    "both infinities": (lambda bias: bias / 0, "NaN or infinity"),
    "infinite as float32": (lambda bias: bias.double() * 1e300, "NaN or infinity"),
}


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:TypedStorage:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", UNFIT)
def test_no_weight(kind: str, features: dict[str, Tensor], tmp_path: Path) -> None:
    make, words = UNFIT[kind]
    name = "features.0.bias"
    state = {**features, name: make(features[name])}
    torch.save(state, tmp_path / "a.pth")
    for given in (state, tmp_path / "a.pth"):
        with pytest.raises(WeightsError, match=words) as error:
            load_trunk_weights(NET, given)
        assert name in str(error.value) and error.value.__cause__ is None
    lin = "lin0.model.1.weight"
    lins = load_lin_weights(NET, "0.1")
    torch.save({**lins, lin: make(lins[lin].flatten())}, tmp_path / "lin.pth")
    with pytest.raises(WeightsError, match=words):
        lpips_fast.LPIPS(net=NET, pnet_rand=True, model_path=tmp_path / "lin.pth", verbose=False)


@pytest.mark.parametrize(
    ("state", "hint"),
    [
        ({"conv1.weight": torch.ones(1)}, "its first key is 'conv1.weight'"),
        ({"lin0.model.1.weight": torch.ones(1)}, "LPIPS's linear weights"),
        ({}, "it is empty"),
    ],
)
def test_foreign_state_dict(state: dict[str, Tensor], hint: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / f"{NET}.pth")
    for given in (state, tmp_path):
        with pytest.raises(WeightsError, match=hint):
            load_trunk_weights(NET, given)


def test_dictionary_that_holds_itself(features: dict[str, Tensor]) -> None:
    state: dict[str, Any] = {**features}
    state["self"] = state
    assert_same(load_trunk_weights(NET, state), features)


def test_file_that_holds_no_state_dict(tmp_path: Path) -> None:
    torch.save([torch.ones(3)], tmp_path / FILENAME)
    with pytest.raises(WeightsError, match=r"\.pth is no state dict.*holds a list"):
        load_trunk_weights(NET, tmp_path / FILENAME)
