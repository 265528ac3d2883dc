"""What people do to the modules of a loss: the numbers are those of `lpips` under the same change,
and the fast path is left where it must be, and nowhere else."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.utils.prune as prune
from parity import image_pair, relative, trunk_weights
from served import needs
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lpips_fast import LPIPS
from lpips_fast.trunk.fire import FireModule

PARTS = ["scaling_layer", "slice1", "slice2", "slice3", "slice4", "slice5", "lins"]
SLICES = PARTS[1:-1]


@functools.cache
def weights_of(net: str) -> dict[str, Tensor]:
    return trunk_weights(net)


def ours(net: str = "alex", **options: Any) -> LPIPS:
    model = LPIPS(net=net, weights=weights_of(net), verbose=False, **options)
    return model.requires_grad_(bool(options.get("pnet_tune")))


_THEIRS: dict[str, nn.Module] = {}  # torchvision draws 60 million numbers to build one


def pair_of_models(reference, net: str = "alex", **options: Any) -> tuple[LPIPS, nn.Module]:
    model, key = ours(net, **options), f"{net} {options}"
    if key not in _THEIRS:
        _THEIRS[key] = reference.LPIPS(net=net, pnet_rand=True, verbose=False, **options)
    theirs = copy.deepcopy(_THEIRS[key])
    theirs.load_state_dict(model.state_dict())
    return model, theirs.requires_grad_(bool(options.get("pnet_tune")))


def images(seed: int = 0, size: int = 64) -> tuple[Tensor, Tensor]:
    return image_pair(2, size, size, torch.float32, seed)


def value_and_gradient(model: Callable[..., Tensor], seed: int) -> tuple[Tensor, Tensor]:
    image, target = images(seed)
    image.requires_grad_()
    value = model(image, target)
    (grad,) = torch.autograd.grad(value.sum(), image)
    return value.detach(), grad


def assert_follows(model: LPIPS, theirs: nn.Module) -> None:
    """Values and gradients of ours are those of lpips, in every way that a call may go."""
    errors = []
    for seed in range(3):
        value, grad = value_and_gradient(model, seed)
        expected, expected_grad = value_and_gradient(theirs, seed)
        assert relative(value, expected) < 1e-5
        errors.append(relative(grad, expected_grad))
        if errors[-1] < 1e-4:
            break
    assert min(errors) < 1e-4  # a ReLU or a window within rounding goes either way now and then
    image, target = images()
    with torch.no_grad():
        expected = theirs(image, target)
        assert relative(model(image, target), expected) < 1e-5
        features = model.encode(target)
        assert relative(model(image, features), expected) < 1e-5
    both = [image.clone().requires_grad_(), target.clone().requires_grad_()]
    assert relative(model(*both).detach(), expected) < 1e-5


def assert_says(model: LPIPS, slow: dict[str, str]) -> None:
    """``fast_path()`` names the clause for the parts in ``slow``, and says yes of the others."""
    for part, verdict in model.fast_path().items():
        if part in slow:
            assert slow[part] in verdict, (part, verdict)
        else:
            assert verdict == "yes", (part, verdict)


def assert_runs(model: LPIPS, run_by_hand: list[str], expected: list[str]) -> None:
    """Exactly the expected slices run by hand, with and without a graph."""
    image, target = images()
    for grad in (False, True):
        run_by_hand.clear()
        with torch.set_grad_enabled(grad):
            model(image.clone().requires_grad_(grad), target)
        assert sorted(set(run_by_hand)) == expected


# ----------------------------------------------------------------------------- one slice differs


def conv_of(model: nn.Module, block: str = "slice2") -> nn.Conv2d:
    return next(m for m in getattr(model.net, block).modules() if isinstance(m, nn.Conv2d))


def replace(model: nn.Module, kind: type, make: Callable[[Any], nn.Module]) -> None:
    """Another module in place of the one of a kind in slice2."""
    block = model.net.slice2
    (name,) = [k for k, m in block.named_children() if type(m) is kind]
    block._modules[name] = make(block._modules[name])


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class LowRank(nn.Module):
    """As LoRA does for convolutions."""

    def __init__(self, conv: nn.Conv2d, rank: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = conv
        self.down = nn.Conv2d(conv.in_channels, rank, 5, padding=2, bias=False)
        self.up = nn.Conv2d(rank, conv.out_channels, 1, bias=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.up(self.down(x))


class HalfConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Weight(nn.Parameter):
    """A subclass of tensors as some libraries keep weights in."""


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.7 * weight


def subclassed(conv: nn.Conv2d) -> nn.Conv2d:
    conv.__class__ = HalfConv
    return conv


def with_attributes(**changes: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for key, value in changes.items():
            setattr(conv_of(model), key, value)

    return change


def with_pool(**changes: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for key, value in changes.items():
            setattr(model.net.slice2[0], key, value)

    return change


def in_groups(model: nn.Module) -> None:
    conv = conv_of(model)
    conv.groups = 2
    conv.weight = nn.Parameter(conv.weight[:, : conv.in_channels // 2].clone(), False)


def reflecting(model: nn.Module) -> None:
    conv_of(model).padding_mode = "reflect"


def dilated(model: nn.Module) -> None:
    conv = conv_of(model)
    conv.dilation, conv.padding = (2, 2), (4, 4)


def shadowed_forward(model: nn.Module) -> None:
    conv = conv_of(model)
    conv.forward = lambda x: 0.5 * nn.Conv2d.forward(conv, x)


def shadowed_convolution(model: nn.Module) -> None:
    conv = conv_of(model)
    conv._conv_forward = lambda x, w, b: nn.Conv2d._conv_forward(conv, x, 0.5 * w, b)


def shadowed_slice(model: nn.Module) -> None:
    block = model.net.slice2
    block.forward = lambda x: 0.5 * nn.Sequential.forward(block, x)


def inserted(model: nn.Module) -> None:
    model.net.slice2.add_module("more", nn.Softplus())


def inserted_in_front(model: nn.Module) -> None:
    model.net.slice2 = nn.Sequential(nn.Tanh(), *model.net.slice2)


def renamed(model: nn.Module) -> None:
    model.net.slice2 = nn.Sequential(*model.net.slice2)


def removed(model: nn.Module) -> None:
    del model.net.slice2[-1]


def reordered(model: nn.Module) -> None:
    """The ReLU before the convolution."""
    layers = list(model.net.slice2._modules.items())
    model.net.slice2._modules.clear()
    for k in (0, 2, 1):
        model.net.slice2._modules[layers[k][0]] = layers[k][1]


def a_list_with_a_forward(model: nn.Module) -> None:
    class Steps(nn.ModuleList):
        def forward(self, x: Tensor) -> Tensor:
            for layer in reversed(list(reversed(self))):
                x = layer(x)
            return 2 * x

    model.net.slice2 = Steps(model.net.slice2)


def hooked(register: str, hook: Callable[..., Any], find: Callable[..., nn.Module], **options: Any):
    def change(model: nn.Module) -> None:
        getattr(find(model), register)(hook, **options)

    return change


def halve(*arguments: Any) -> Tensor:
    return 0.5 * arguments[-1]


def halve_inputs(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(0.5 * x for x in arguments)


def halve_inputs_with_kwargs(module: nn.Module, arguments: Any, kwargs: Any) -> Any:
    return halve_inputs(module, arguments), kwargs


def halve_gradients(module: nn.Module, grads: Any, *_: Any) -> Any:
    return tuple(None if g is None else 0.5 * g for g in grads)


def flattened(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    """Counts on the memory order that lpips has."""
    return 0.5 * output.view(len(output), -1).view(output.shape)


def in_place(module: nn.Module, arguments: Any, output: Tensor) -> None:
    with torch.no_grad():
        output.mul_(0.5)


def parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(conv_of(model), "weight", Scaled())


def pruned(model: nn.Module) -> None:
    prune.l1_unstructured(conv_of(model), "weight", 0.5)


def normed(norm: Callable[..., Any], **options: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        torch.manual_seed(0)
        norm(conv_of(model), **options)
        model.requires_grad_(False)

    return change


def without_bias(model: nn.Module) -> None:
    conv_of(model).bias = None


def weight_of_a_subclass(model: nn.Module) -> None:
    conv = conv_of(model)
    weight = conv.weight.detach()
    del conv.weight
    conv.register_parameter("weight", Weight(weight, requires_grad=False))


def weight_with_gaps(model: nn.Module) -> None:
    conv = conv_of(model)
    wide = torch.zeros(*conv.weight.shape[:3], 2 * conv.weight.shape[3])
    wide[..., ::2] = conv.weight
    conv.weight = nn.Parameter(wide[..., ::2], requires_grad=False)


def bias_with_gaps(model: nn.Module) -> None:
    conv = conv_of(model)
    conv.bias = nn.Parameter(torch.stack((conv.bias, conv.bias + 1), 1)[:, 0], requires_grad=False)


def one_bias_for_all(model: nn.Module) -> None:
    conv = conv_of(model)
    conv.bias = nn.Parameter(torch.tensor([0.1]).expand(conv.out_channels), requires_grad=False)


def a_weight_that_learns(model: nn.Module) -> None:
    conv_of(model).weight.requires_grad_()


def a_bias_that_learns(model: nn.Module) -> None:
    conv_of(model).bias.requires_grad_()


def batch_normalised(model: nn.Module) -> None:
    norm = nn.BatchNorm2d(conv_of(model).out_channels).requires_grad_(False)
    model.net.slice2.add_module("norm", norm)
    norm.train()


def dropping(model: nn.Module) -> None:
    model.net.slice2.add_module("drop", nn.Dropout(0.3))
    model.net.slice2.train()


def checkpointed(model: nn.Module) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.net.slice2 = checkpoint_wrapper(model.net.slice2)


def scripted(model: nn.Module) -> None:
    model.net.slice2 = torch.jit.script(model.net.slice2)


def a_slice_of_other_modules(model: nn.Module) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 192, 3, stride=2, padding=1)
    model.net.slice2 = nn.Sequential(conv, nn.GELU()).requires_grad_(False)


ONE_SLICE: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    # A class other than the table's.
    "another activation": (lambda m: replace(m, nn.ReLU, lambda _: nn.ELU()), "is a ELU, not a"),
    "average pooling": (
        lambda m: replace(m, nn.MaxPool2d, lambda p: nn.AvgPool2d(p.kernel_size, p.stride)),
        "is a AvgPool2d, not a MaxPool2d",
    ),
    "a ReLU6": (lambda m: replace(m, nn.ReLU, lambda _: nn.ReLU6()), "is a ReLU6"),
    "a wrapper that does nothing": (lambda m: replace(m, nn.Conv2d, Around), "is a Around"),
    "low rank beside": (lambda m: replace(m, nn.Conv2d, LowRank), "is a LowRank"),
    "class assigned": (lambda m: replace(m, nn.Conv2d, subclassed), "is a HalfConv"),
    "an identity": (lambda m: replace(m, nn.ReLU, lambda _: nn.Identity()), "is a Identity"),
    "a checkpoint wrapper": (checkpointed, "is a CheckpointWrapper, not a Sequential"),
    "a scripted slice": (scripted, "is a RecursiveScriptModule"),
    "a list with a forward": (a_list_with_a_forward, "is a Steps"),
    # Another configuration.
    "stride": (with_attributes(stride=(2, 2)), "has stride (2, 2), not (1, 1) as built"),
    "padding": (with_attributes(padding=(0, 0)), "has padding (0, 0), not (2, 2)"),
    "padding by name": (with_attributes(padding="same"), "has padding 'same'"),
    "padding mode": (reflecting, "has padding_mode 'reflect'"),
    "dilation": (dilated, "has padding (4, 4)"),
    "groups": (in_groups, "has groups 2"),
    "no bias": (without_bias, "has a bias that is a NoneType"),
    "pooling window": (with_pool(kernel_size=2), "has kernel_size 2, not 3"),
    "pooling stride": (with_pool(stride=1), "has stride 1, not 2"),
    "pooling padding": (with_pool(padding=1), "has padding 1, not 0"),
    "pooling dilation": (with_pool(dilation=2), "has dilation 2, not 1"),
    "pooling ceiling": (with_pool(ceil_mode=True), "has ceil_mode True, not False"),
    "ReLU not in place": (
        lambda m: setattr(m.net.slice2[-1], "inplace", False),
        "has inplace False, not True",
    ),
    # Another order.
    "a layer more": (inserted, "holds other layers, or in another order"),
    "a layer in front": (inserted_in_front, "holds other layers, or in another order"),
    "a layer less": (removed, "holds other layers, or in another order"),
    "reordered": (reordered, "holds other layers, or in another order"),
    "renamed layers": (renamed, "holds other layers, or in another order"),
    "other modules": (a_slice_of_other_modules, "holds other layers, or in another order"),
    "batch normalisation": (batch_normalised, "holds other layers"),
    # Attributes that nn.Module does not make.
    "a shadowed forward": (shadowed_forward, "has other attributes than as built: forward"),
    "a shadowed convolution": (shadowed_convolution, "attributes than as built: _conv_forward"),
    "a shadowed slice": (shadowed_slice, "has other attributes than as built: forward"),
    # Hooks.
    "forward hook": (hooked("register_forward_hook", halve, conv_of), "has a hook (forward hook)"),
    "forward hook with kwargs": (
        hooked("register_forward_hook", halve, conv_of, with_kwargs=True),
        "has a hook (forward hook)",
    ),
    "forward hook always called": (
        hooked("register_forward_hook", halve, conv_of, always_call=True),
        "has a hook (forward hook)",
    ),
    "forward hook in place": (
        hooked("register_forward_hook", in_place, lambda m: m.net.slice2[0]),
        "has a hook (forward hook)",
    ),
    "forward hook that counts on the memory order": (
        hooked("register_forward_hook", flattened, lambda m: m.net.slice2[0]),
        "has a hook (forward hook)",
    ),
    "forward pre-hook": (
        hooked("register_forward_pre_hook", halve_inputs, conv_of),
        "has a hook (forward pre hook)",
    ),
    "forward pre-hook with kwargs": (
        hooked("register_forward_pre_hook", halve_inputs_with_kwargs, conv_of, with_kwargs=True),
        "has a hook (forward pre hook)",
    ),
    "full backward hook": (
        hooked("register_full_backward_hook", halve_gradients, lambda m: m.net.slice2[0]),
        "has a hook (backward hook)",
    ),
    "full backward pre-hook": (
        hooked("register_full_backward_pre_hook", halve_gradients, lambda m: m.net.slice2[0]),
        "has a hook (backward pre hook)",
    ),
    "a hook on the slice": (
        hooked("register_forward_hook", halve, lambda m: m.net.slice2),
        "has a hook (forward hook)",
    ),
    "a backward hook on the slice": (
        hooked("register_full_backward_hook", halve_gradients, lambda m: m.net.slice2),
        "has a hook (backward hook)",
    ),
    # Parametrisations.
    "parametrised": (parametrized, "is a ParametrizedConv2d"),
    "pruned": (pruned, "has a hook (forward pre hook)"),
    "weight norm": (normed(parametrizations.weight_norm), "is a ParametrizedConv2d"),
    "old weight norm": (
        normed(torch.nn.utils.weight_norm),
        "has a hook (forward pre hook)",
    ),
    "spectral norm": (normed(parametrizations.spectral_norm), "is a ParametrizedConv2d"),
    "old spectral norm": (
        normed(torch.nn.utils.spectral_norm),
        "has a hook (forward pre hook)",
    ),
    "orthogonal": (normed(parametrizations.orthogonal), "is a ParametrizedConv2d"),
    # Weights.
    "a weight of a subclass": (weight_of_a_subclass, "has a weight that is a Weight, no plain"),
    "a weight with gaps": (weight_with_gaps, "a weight does not lie dense in memory"),
    "a bias with gaps": (bias_with_gaps, "a weight does not lie dense in memory"),
    "one bias for all": (one_bias_for_all, "a weight does not lie dense in memory"),
    "a weight that learns": (a_weight_that_learns, "has weights that learn"),
    "a bias that learns": (a_bias_that_learns, "has weights that learn"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ONE_SLICE)
def test_a_change_of_one_slice_costs_no_other(name, reference, run_by_hand):
    change, clause = ONE_SLICE[name]
    models = pair_of_models(reference)
    models[0](*images())  # what is packed now must not answer later
    for model in models:
        change(model)
    assert_says(models[0], {"slice2": clause})
    others = [s for s in SLICES if s != "slice2"]
    if "learn" not in name:
        assert_runs(models[0], run_by_hand, others)
        assert_follows(*models)
    else:  # without a graph its weights are as good as frozen
        image, target = images()
        run_by_hand.clear()
        models[0](image, target)
        assert sorted(set(run_by_hand)) == others
        with torch.no_grad():
            run_by_hand.clear()
            models[0](image, target)
            assert sorted(set(run_by_hand)) == SLICES
            assert models[0].fast_path()["slice2"] == "yes"
        assert_follows(*models)
        grads = []
        for model in models:
            model(image, target).sum().backward()
            grads.append([p.grad for p in model.net.parameters() if p.requires_grad])
        assert len(grads[0]) == len(grads[1]) == 1
        assert relative(grads[0][0], grads[1][0]) < 1e-4


@pytest.mark.parametrize(
    "find",
    [
        lambda fire: fire,
        lambda fire: fire.squeeze,
        lambda fire: fire.expand1x1,
        lambda fire: fire.expand3x3,
    ],
    ids=["the module", "squeeze", "expand1x1", "expand3x3"],
)
def test_hook_inside_a_fire_module(find, reference, run_by_hand):
    models = pair_of_models(reference, "squeeze")
    for model in models:
        fire = next(
            m for m in model.net.slice3.modules() if type(m).__name__ in ("Fire", "FireModule")
        )
        find(fire).register_forward_hook(halve)
    slow = models[0].fast_path()
    assert {k for k, v in slow.items() if v != "yes"} == {"slice3"}
    assert "has a hook" in slow["slice3"]
    assert_runs(models[0], run_by_hand, [f"slice{k}" for k in (1, 2, 4, 5, 6, 7)])
    assert_follows(*models)


def test_weights_that_learn_in_another_slice(reference, run_by_hand):
    models = pair_of_models(reference)
    for model in models:
        for parameter in model.net.slice4.parameters():
            parameter.requires_grad_()
    models[0](*images())
    assert set(run_by_hand) == {"slice1", "slice2", "slice3", "slice5"}
    assert_follows(*models)


def test_a_trunk_that_learns_whole(reference, run_by_hand):
    models = pair_of_models(reference, pnet_tune=True)
    assert_says(models[0], dict.fromkeys(SLICES, "has weights that learn"))
    image, target = images()
    grads = []
    for model in models:
        model(image, target).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.net.parameters()]))
    assert run_by_hand == []
    assert relative(*grads) < 1e-4


def test_two_changed_slices_and_the_scaling_layer(reference, run_by_hand):
    models = pair_of_models(reference)
    for model in models:
        model.net.slice1[0].register_forward_hook(halve)
        model.net.slice5.add_module("more", nn.Softplus())
        model.scaling_layer.register_forward_hook(halve)
    slow = {"slice1": "0 has a hook", "slice5": "holds other layers", "scaling_layer": "a hook"}
    assert_says(models[0], slow)
    assert_runs(models[0], run_by_hand, ["slice2", "slice3", "slice4"])
    assert_follows(*models)


# -------------------------------------------------------------------------- other parts than slices


def own_lins(kind: Callable[[int], nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        torch.manual_seed(0)
        model.lins = nn.ModuleList(kind(c) for c in model.chns).requires_grad_(False)

    return change


def fresh_lins(model: nn.Module) -> None:
    kind = type(model.lin0)
    model.lins = nn.ModuleList(kind(c) for c in model.chns)
    for lin in model.lins:
        nn.init.constant_(lin.model[-1].weight, 0.01)
    model.requires_grad_(False)


def a_bias_in_a_lin(model: nn.Module) -> None:
    model.lins[1].model[-1].bias = nn.Parameter(torch.tensor([0.3]), requires_grad=False)


def shorter(model: nn.Module) -> None:
    model.L = 3


def shorter_lins(model: nn.Module) -> None:
    model.L = 3
    model.lins = model.lins[:3]


def lins_in_a_python_list(model: nn.Module) -> None:
    lins = list(model.lins)
    del model.lins
    model.lins = lins


def learned_shift(model: nn.Module) -> None:
    model.scaling_layer.shift.requires_grad_()


OTHER_PARTS: dict[str, tuple[Callable[[nn.Module], Any], dict[str, str], bool]] = {
    # What changes, what fast_path says, and whether the slices still run by hand.
    "hook on the scaling layer": (
        hooked("register_forward_hook", halve, lambda m: m.scaling_layer),
        {"scaling_layer": "has a hook (forward hook)"},
        True,
    ),
    "no scaling layer": (
        lambda m: setattr(m, "scaling_layer", nn.Identity()),
        {"scaling_layer": "is a Identity, not a ScalingLayer"},
        True,
    ),
    "another shift": (lambda m: m.scaling_layer.shift.data.fill_(0.2), {}, True),
    "a shift for every pixel": (
        lambda m: setattr(m.scaling_layer, "shift", 0.1 * torch.ones(1, 3, 64, 64)),
        {"scaling_layer": "has a shift that is not one number a channel"},
        True,
    ),
    "one scale for all channels": (
        lambda m: setattr(m.scaling_layer, "scale", torch.tensor([[[[0.5]]]])),
        {"scaling_layer": "has a scale that is not one number a channel"},
        True,
    ),
    "a shift that learns": (learned_shift, {"scaling_layer": "has a shift that learns"}, True),
    "hook on the trunk": (
        hooked("register_forward_hook", lambda m, a, o: tuple(0.5 * t for t in o), lambda m: m.net),
        {**dict.fromkeys(PARTS[:-1], "has a hook (forward hook)")},
        True,
    ),
    "trunk in DataParallel": (
        lambda m: setattr(m, "net", nn.DataParallel(m.net)),
        {**dict.fromkeys(PARTS[:-1], "is a DataParallel, not a Trunk")},
        True,
    ),
    "trunk wrapped": (
        lambda m: setattr(m, "net", Around(m.net)),
        {**dict.fromkeys(PARTS[:-1], "is a Around, not a Trunk")},
        True,
    ),
    "hook on a linear layer": (
        hooked("register_forward_hook", halve, lambda m: m.lins[1]),
        {"lins": "has a hook (forward hook)"},
        True,
    ),
    "hook inside a linear layer": (
        hooked("register_forward_hook", halve, lambda m: m.lins[1].model[-1]),
        {"lins": "1 has a hook (forward hook)"},
        True,
    ),
    "hook on a dropout": (
        hooked("register_forward_hook", halve, lambda m: m.lins[1].model[0]),
        {"lins": "0 has a hook (forward hook)"},
        True,
    ),
    "pre-hook on a linear layer": (
        hooked("register_forward_pre_hook", halve_inputs, lambda m: m.lins[1]),
        {"lins": "has a hook (forward pre hook)"},
        True,
    ),
    "fresh lins": (fresh_lins, {}, True),
    "lins of another class": (
        own_lins(lambda c: nn.Conv2d(c, 1, 1)),
        {"lins": "is a Conv2d, not a NetLinLayer"},
        True,
    ),
    "lins that are no convolutions": (
        own_lins(lambda c: nn.Sequential(nn.Conv2d(c, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 1, 1))),
        {"lins": "is a Sequential"},
        True,
    ),
    "a lin with a bias": (a_bias_in_a_lin, {"lins": "has a bias"}, True),
    "a lin with a larger window": (
        lambda m: setattr(m.lins[0].model[-1], "padding", (1, 1)),
        {"lins": "has padding (1, 1)"},
        True,
    ),
    "a shadowed lin": (
        lambda m: setattr(m.lins[0], "forward", lambda x: x.sum(1, keepdim=True)),
        {"lins": "than as built: forward"},
        True,
    ),
    "a parametrised lin": (
        lambda m: parametrize.register_parametrization(m.lins[0].model[-1], "weight", Scaled()),
        {"lins": "is a ParametrizedConv2d"},
        True,
    ),
    "a pruned lin": (
        lambda m: prune.l1_unstructured(m.lins[0].model[-1], "weight", 0.5),
        {"lins": "has a hook (forward pre hook)"},
        True,
    ),
    "lins in a python list": (lins_in_a_python_list, {}, True),
    "only lin0 replaced, which nothing calls": (
        lambda m: setattr(m, "lin0", nn.Identity()),
        {},
        True,
    ),
    "other counts of channels, which nothing reads": (
        lambda m: setattr(m, "chns", [1, 2, 3, 4, 5]),
        {},
        True,
    ),
    "written weights of a lin": (lambda m: m.lins[2].model[-1].weight.data.mul_(3), {}, True),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", OTHER_PARTS)
def test_a_change_of_another_part(name, reference, run_by_hand):
    change, clauses, by_hand = OTHER_PARTS[name]
    models = pair_of_models(reference)
    for model in models:
        change(model)
    assert_says(models[0], clauses)
    assert_runs(models[0], run_by_hand, SLICES if by_hand else [])
    assert_follows(*models)
    models[0].repack()  # whatever the trunk is now


def test_a_shift_that_learns_gets_its_gradient(reference):
    models = pair_of_models(reference)
    grads = []
    for model in models:
        learned_shift(model)
        model(*images()).sum().backward()
        grads.append(model.scaling_layer.shift.grad)
    assert relative(*grads) < 1e-4


@pytest.mark.parametrize("change", [shorter, shorter_lins])
def test_fewer_layers(change, reference, run_by_hand):
    models = pair_of_models(reference)
    for model in models:
        change(model)
    assert_runs(models[0], run_by_hand, ["slice1", "slice2", "slice3"])
    assert_follows(*models)
    assert len(models[0](*images(), retPerLayer=True)[1]) == 3


@pytest.mark.parametrize("options", [{"lpips": False}, {"spatial": True}], ids=str)
@pytest.mark.parametrize("name", ["another activation", "forward hook", "other modules", "stride"])
def test_baseline_and_maps_follow_too(name, options, reference):
    models = pair_of_models(reference, **options)
    for model in models:
        ONE_SLICE[name][0](model)
    assert_follows(*models)


def test_another_number_of_channels_without_linear_weights(reference):
    """Nothing but the linear weights knows how many channels there are."""
    models = pair_of_models(reference, lpips=False)
    found = []
    for model in models:
        torch.manual_seed(0)
        conv = nn.Conv2d(256, 7, 3, padding=1).requires_grad_(False)
        model.net.slice5 = nn.Sequential(conv, nn.ReLU())
        found.append(value_and_gradient(model, 0))
    assert relative(found[0][0], found[1][0]) < 1e-5
    assert relative(found[0][1], found[1][1]) < 1e-4


def test_old_version_and_unit_range(reference):
    for options in ({"version": "0.0"}, {}):
        models = pair_of_models(reference, **options)
        for model in models:
            model.scaling_layer.register_forward_hook(halve)
            model.net.slice1[0].register_forward_hook(halve)
        assert_follows(*models)
        found = [m((images()[0] + 1) / 2, (images()[1] + 1) / 2, normalize=True) for m in models]
        assert relative(*found) < 1e-5


def test_dropout_of_the_linear_layers_in_training(run_by_hand):
    model = ours().train()
    assert_says(model, {"lins": "drops channels in training mode"})
    assert_runs(model, run_by_hand, SLICES)
    torch.manual_seed(0)
    first = model(*images())
    assert not torch.equal(first, model(*images()))
    torch.manual_seed(0)
    assert torch.equal(first, model(*images()))


def test_batch_normalisation_sees_what_it_sees_in_lpips(reference):
    """Its running statistics, too: one image, then the other."""
    models = pair_of_models(reference)
    for model in models:
        batch_normalised(model)
        model(*images())
    for key in ("running_mean", "running_var"):
        found = [getattr(model.net.slice2.norm, key) for model in models]
        assert relative(*found) < 1e-5
    assert models[0].net.slice2.norm.num_batches_tracked == 2


def test_dropout_in_a_slice_drops_what_it_drops_in_lpips(reference, run_by_hand):
    """With the same numbers drawn: one image, then the other, in the same memory order."""
    models = pair_of_models(reference)
    found = []
    for model in models:
        dropping(model)
        torch.manual_seed(0)
        found.append(value_and_gradient(model, 0))
    assert "slice2" not in run_by_hand and "holds other layers" in models[0].fast_path()["slice2"]
    assert relative(found[0][0], found[1][0]) < 1e-5
    assert relative(found[0][1], found[1][1]) < 1e-3
    assert relative(models[0](*images()), found[0][0]) > 1e-3, "nothing was dropped"


def test_hooks_see_what_they_see_in_lpips(reference):
    """As often, in the same order, and with the same values."""
    seen: list[list[Tensor]] = [[], []]
    models = pair_of_models(reference)
    for model, notes in zip(models, seen):
        for block in (model.net.slice2, model.net.slice4[0], model.lins[1]):
            block.register_forward_hook(lambda m, a, output, notes=notes: notes.append(output))
        model(*images())
    assert len(seen[0]) == len(seen[1]) == 5
    for found, expected in zip(*seen):
        assert found.shape == expected.shape and relative(found, expected) < 1e-5


def test_captured_gradients_of_a_hooked_slice(reference):
    grads: list[list[Tensor]] = [[], []]
    models = pair_of_models(reference)
    for model, notes in zip(models, grads):
        model.net.slice3.register_full_backward_hook(
            lambda m, inputs, outputs, notes=notes: notes.append(outputs[0])
        )
        value_and_gradient(model, 0)
    assert len(grads[0]) == len(grads[1]) == 1
    assert relative(grads[0][0], grads[1][0]) < 1e-4


# ------------------------------------------------------------------------ errors where lpips errs


def of_double(model: nn.Module) -> None:
    conv_of(model).double()


def sparse(model: nn.Module) -> None:
    conv = conv_of(model)
    conv.weight = nn.Parameter(conv.weight.detach().to_sparse(), requires_grad=False)


def quantised(model: nn.Module) -> None:
    conv = conv_of(model)
    weight = torch.quantize_per_tensor(conv.weight.detach(), 0.01, 0, torch.qint8)
    del conv.weight
    conv.weight = nn.Parameter(weight, requires_grad=False)


def on_meta(model: nn.Module) -> None:
    conv_of(model).to("meta")


def without_memory(model: nn.Module) -> None:
    conv_of(model).weight.untyped_storage().resize_(0)


def with_indices(model: nn.Module) -> None:
    model.net.slice2[0].return_indices = True


def wrong_shape(model: nn.Module) -> None:
    conv = conv_of(model)
    conv.weight = nn.Parameter(conv.weight[:, :32].clone(), requires_grad=False)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("change", "clause"),
    [
        (of_double, "a weight is torch.float64 and the images are torch.float32"),
        (sparse, "a weight has no memory of its own"),
        (quantised, "a weight is torch.qint8"),
        (with_indices, "has return_indices True"),
        (wrong_shape, "has a weight of another shape"),
        (without_memory, "a weight has no memory of its own"),
    ],
)
def test_an_error_where_lpips_errs(change, clause, reference, run_by_hand):
    models = pair_of_models(reference)
    models[0](*images())
    for model in models:
        change(model)
    assert clause in models[0].fast_path()["slice2"]
    run_by_hand.clear()
    errors = []
    for model in models if change is not without_memory else models[:1]:  # which crashes lpips
        with pytest.raises((RuntimeError, TypeError, NotImplementedError)) as error:
            model(*images())
        errors.append(error.type)
    assert len(set(errors)) == 1
    assert "slice2" not in run_by_hand


def test_a_layer_on_the_meta_device():
    """torch's convolution takes such a weight and returns memory that nobody wrote to."""
    model = ours()
    on_meta(model)
    assert_says(model, {"slice2": "a weight is on meta and the images are on cpu"})
    with pytest.raises(RuntimeError, match="slice2 has weights on the meta device"):
        model(*images())


# --------------------------------------------------------------------------- nothing runs by hand


@contextlib.contextmanager
def patched(target: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, value)
        yield


def halved(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments, **options: 0.5 * function(*arguments, **options)


@contextlib.contextmanager
def global_hook(register: str, hook: Callable[..., Any]) -> Iterator[None]:
    handle = getattr(nn.modules.module, register)(hook)
    try:
        yield
    finally:
        handle.remove()


class HalvingConvolutions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        return (
            0.5 * result if function is nn.functional.conv2d or function is torch.conv2d else result
        )


class HalvingDispatch(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        return result * 0.5 if function is torch.ops.aten.convolution.default else result


def halve_convolutions(module: nn.Module, arguments: Any, output: Any) -> Any:
    return 0.5 * output if isinstance(module, nn.Conv2d) else None


def halve_inputs_of_convolutions(module: nn.Module, arguments: Any) -> Any:
    return (0.5 * arguments[0],) if isinstance(module, nn.Conv2d) else None


def halve_gradients_of_convolutions(module: nn.Module, grads: Any, *_: Any) -> Any:
    return halve_gradients(module, grads) if isinstance(module, nn.Conv2d) else None


EVERYTHING: dict[str, tuple[Callable[[], contextlib.AbstractContextManager[None]], str]] = {
    "patched nn.Conv2d.forward": (
        lambda: patched(nn.Conv2d, "forward", halved(nn.Conv2d.forward)),
        "Conv2d.forward was replaced",
    ),
    "patched nn.Conv2d._conv_forward": (
        lambda: patched(nn.Conv2d, "_conv_forward", halved(nn.Conv2d._conv_forward)),
        "Conv2d._conv_forward was replaced",
    ),
    "patched nn.ReLU.forward": (
        lambda: patched(nn.ReLU, "forward", lambda self, x: nn.functional.elu(x)),
        "ReLU.forward was replaced",
    ),
    "patched nn.MaxPool2d.forward": (
        lambda: patched(nn.MaxPool2d, "forward", lambda self, x: nn.functional.avg_pool2d(x, 3, 2)),
        "MaxPool2d.forward was replaced",
    ),
    "patched nn.Sequential.forward": (
        lambda: patched(nn.Sequential, "forward", halved(nn.Sequential.forward)),
        "Sequential.forward was replaced",
    ),
    "patched nn.functional.conv2d": (
        lambda: patched(nn.functional, "conv2d", halved(nn.functional.conv2d)),
        "torch.nn.functional.conv2d was replaced",
    ),
    "patched nn.functional.relu": (
        lambda: patched(nn.functional, "relu", lambda x, inplace=False: nn.functional.elu(x)),
        "torch.nn.functional.relu was replaced",
    ),
    "global forward hook": (
        lambda: global_hook("register_module_forward_hook", halve_convolutions),
        "hooks are registered for all modules",
    ),
    "global forward pre-hook": (
        lambda: global_hook("register_module_forward_pre_hook", halve_inputs_of_convolutions),
        "hooks are registered for all modules",
    ),
    "a TorchFunctionMode": (HalvingConvolutions, "a TorchFunctionMode is active"),
    "a TorchDispatchMode": (HalvingDispatch, "a TorchDispatchMode is active"),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_what_changes_every_module(name, reference, run_by_hand):
    context, clause = EVERYTHING[name]
    models = pair_of_models(reference)
    with context():
        assert_says(models[0], dict.fromkeys(PARTS, clause))
        assert_runs(models[0], run_by_hand, [])
        assert_follows(*models)
    assert_says(models[0], {})
    assert_runs(models[0], run_by_hand, SLICES)
    assert_follows(*models)


@pytest.mark.parametrize(
    "register", ["register_module_full_backward_hook", "register_module_full_backward_pre_hook"]
)
def test_global_backward_hooks(register, reference, run_by_hand):
    """Which ReLUs in place do not bear, here as in lpips."""
    models = pair_of_models(reference)
    with global_hook(register, halve_gradients_of_convolutions):
        for model in models:
            with pytest.raises(RuntimeError, match="modified inplace"):
                value_and_gradient(model, 0)
            for module in model.modules():
                if isinstance(module, nn.ReLU):
                    module.inplace = False
        clause = "hooks are registered for all modules"
        assert_says(models[0], dict.fromkeys(PARTS, clause))
        assert_runs(models[0], run_by_hand, [])
        assert_follows(*models)


@pytest.mark.parametrize("name", ["scaling_layer", "net", "lins"])
def test_a_patched_class_of_ours(name, reference, run_by_hand):
    """A script replaces the same method of both."""
    models = pair_of_models(reference)
    kinds = [type(m.lins[0] if name == "lins" else getattr(m, name)) for m in models]
    if name == "net":

        def forward(self, x, functions={k: k.forward for k in kinds}):  # noqa: B006
            return [0.5 * tap for tap in functions[type(self)](self, x)]

    else:

        def forward(self, x, functions={k: k.forward for k in kinds}):  # noqa: B006
            return 0.5 * functions[type(self)](self, x)

    with pytest.MonkeyPatch.context() as patch:
        for kind in kinds:
            patch.setattr(kind, "forward", forward)
        clause = f"{kinds[0].__name__}, of which a method was replaced"
        slow = PARTS[:-1] if name == "net" else [name]
        assert_says(models[0], dict.fromkeys(slow, clause))
        assert_runs(models[0], run_by_hand, SLICES)
        assert_follows(*models)
    assert_says(models[0], {})


def test_a_replaced_class_of_torch(run_by_hand):
    """Who replaces ``nn.Conv2d`` itself, and builds a model then, gets what it computes."""
    with patched(nn, "Conv2d", HalfConv):
        model = ours()
        assert type(model.net.slice1[0]) is HalfConv
        assert "torch.nn.Conv2d was replaced" in model.fast_path()["slice1"]
        value = model(*images())
    assert model.fast_path()["slice1"].startswith("0 is a HalfConv")
    assert run_by_hand == []
    assert torch.allclose(model(*images()), value)
    assert not torch.allclose(ours()(*images()), value, rtol=1e-2)


class Logged(Tensor):
    """A subclass of tensors that notes what is called with it."""

    calls: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        cls.calls.append(getattr(function, "__name__", str(function)))
        return super().__torch_function__(function, types, arguments, options or {})


def test_images_of_a_subclass(reference, run_by_hand):
    models = pair_of_models(reference)
    image, target = images()
    found = []
    for model in models:
        Logged.calls.clear()
        found.append(model(image.as_subclass(Logged), target.as_subclass(Logged)))
        assert Logged.calls.count("conv2d") >= 10
    assert run_by_hand == []
    assert all(isinstance(value, Logged) for value in found)
    assert relative(*(value.as_subclass(Tensor) for value in found)) < 1e-5


def test_a_parameter_as_an_image_is_plain(run_by_hand):
    """As who optimises one."""
    image, target = images()
    ours()(nn.Parameter(image), target).sum().backward()
    assert set(run_by_hand) == set(SLICES)


def test_fake_tensors(run_by_hand):
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = ours()
    with FakeTensorMode(allow_non_fake_inputs=True):
        value = model(torch.empty(2, 3, 64, 64), torch.empty(2, 3, 64, 64))
    assert value.shape == (2, 1, 1, 1) and run_by_hand == []


def test_meta_tensors(run_by_hand):
    model = ours().to("meta")
    assert_says(model, dict.fromkeys(PARTS[:-1], "there are no kernels for meta"))
    image = torch.empty(2, 3, 64, 64, device="meta")
    assert model(image, image).shape == (2, 1, 1, 1) and run_by_hand == []


def test_empty_batches(reference, run_by_hand):
    models = pair_of_models(reference)
    empty = torch.zeros(0, 3, 64, 64)
    values = [model(empty, empty) for model in models]
    assert values[0].shape == values[1].shape == (0, 1, 1, 1)
    assert run_by_hand == []


def test_transforms(run_by_hand):
    model = ours()
    image, target = images()
    torch.func.grad(lambda x: model(x, target).sum())(image)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(image, torch.ones_like(image))
        model(dual, target)
    assert run_by_hand == []


# ------------------------------------------------------------------ what leaves the fast path taken


def saved(model: LPIPS) -> LPIPS:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assigned(model: LPIPS) -> LPIPS:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    return model


def without_its_hooks(model: LPIPS) -> LPIPS:
    handles = []
    for module in model.modules():
        handles += [
            module.register_forward_hook(halve),
            module.register_forward_hook(halve, with_kwargs=True, always_call=True),
            module.register_forward_pre_hook(halve_inputs),
            module.register_forward_pre_hook(halve_inputs_with_kwargs, with_kwargs=True),
            module.register_full_backward_pre_hook(halve_gradients),
            module.register_full_backward_hook(halve_gradients),
        ]
    for handle in handles:
        handle.remove()
    return model


def with_state_dict_hooks(model: LPIPS) -> LPIPS:
    for module in list(model.modules()):
        module.register_state_dict_post_hook(lambda *_: None)
        module.register_state_dict_pre_hook(lambda *_: None)
        module.register_load_state_dict_pre_hook(lambda *_: None)
        module.register_load_state_dict_post_hook(lambda *_: None)
    model.load_state_dict(model.state_dict())
    return model


def pruned_for_good(model: LPIPS) -> LPIPS:
    for block in SLICES:
        conv = conv_of(model, block)
        prune.l1_unstructured(conv, "weight", 0.0)
        prune.remove(conv, "weight")
    return model


def parametrised_and_back(model: LPIPS) -> LPIPS:
    for block in SLICES:
        conv = conv_of(model, block)
        parametrize.register_parametrization(conv, "weight", nn.Identity())
        parametrize.remove_parametrizations(conv, "weight")
    return model


def normed_and_back(model: LPIPS) -> LPIPS:
    for block in SLICES:
        torch.nn.utils.weight_norm(conv_of(model, block))
        torch.nn.utils.remove_weight_norm(conv_of(model, block))
    return model.requires_grad_(False)


def with_fused_normalisation(model: LPIPS) -> LPIPS:
    """Of no effect, so that the values can be compared; the fused layer is a new module."""
    conv = model.net.slice3[1]
    norm = nn.BatchNorm2d(conv.out_channels, eps=0.0).eval()
    model.net.slice3[1] = torch.nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), norm)
    return model.requires_grad_(False)


def with_new_modules(model: LPIPS) -> LPIPS:
    """Identity does not matter: equal modules in place of the old."""
    for block in model.net.slices():
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Conv2d):
                options = (layer.kernel_size, layer.stride, layer.padding)
                new: nn.Module = nn.Conv2d(layer.in_channels, layer.out_channels, *options)
                new.load_state_dict(layer.state_dict())
                block._modules[name] = new.requires_grad_(False)
            elif isinstance(layer, nn.ReLU):
                block._modules[name] = nn.ReLU(inplace=True)
            elif isinstance(layer, nn.MaxPool2d):
                block._modules[name] = nn.MaxPool2d(3, 2)
    return model


def with_written_weights(model: LPIPS) -> LPIPS:
    for parameter in model.net.parameters():
        parameter.data.mul_(1.0)
        parameter.data = parameter.data.clone()
    return model


def in_shared_memory(model: LPIPS) -> LPIPS:
    return model.share_memory()


LEGAL: dict[str, Callable[[LPIPS], LPIPS]] = {
    "as built": lambda m: m,
    "deepcopy": copy.deepcopy,
    "copy of a copy": lambda m: copy.deepcopy(copy.deepcopy(m)),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save and load": saved,
    ".to()": lambda m: m.to("cpu").to(torch.float64).to(torch.float32),
    "channels-last": lambda m: m.to(memory_format=torch.channels_last),
    ".cpu().float()": lambda m: m.cpu().float(),
    "train and eval": lambda m: m.train().eval(),
    "train of the trunk": lambda m: (m.net.train(), m)[1],
    "requires_grad_ and back": lambda m: m.requires_grad_(True).requires_grad_(False),
    "share_memory": in_shared_memory,
    "load_state_dict": lambda m: (m.load_state_dict(copy.deepcopy(m.state_dict())), m)[1],
    "load_state_dict with assign": assigned,
    "apply": lambda m: m.apply(lambda module: None),
    "zero_grad": lambda m: (m.zero_grad(), m)[1],
    "hooks that were removed": without_its_hooks,
    "hooks of state dicts": with_state_dict_hooks,
    "pruned for good": pruned_for_good,
    "parametrised and back": parametrised_and_back,
    "weight norm and back": normed_and_back,
    "a fused batch normalisation": with_fused_normalisation,
    "equal modules in place of the old": with_new_modules,
    "weights written and replaced": with_written_weights,
    "a submodule of another model": lambda m: nn.ModuleDict({"loss": m})["loss"],
    "to_empty and loaded": lambda m: _to_empty(m),
}


def _to_empty(model: LPIPS) -> LPIPS:
    state = copy.deepcopy(model.state_dict())
    model = model.to("meta").to_empty(device="cpu")
    model.load_state_dict(state)
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", LEGAL)
def test_the_fast_path_is_still_taken(name, run_by_hand):
    before = ours()
    expected, expected_grad = value_and_gradient(before, 0)
    model = LEGAL[name](before)
    assert_says(model, {})
    assert_runs(model, run_by_hand, SLICES)
    value, grad = value_and_gradient(model, 0)
    assert relative(value, expected) < 1e-6 and relative(grad, expected_grad) < 1e-4


@pytest.mark.parametrize("net", ["vgg", "squeeze"])
def test_of_other_trunks_too(net, run_by_hand):
    for make in (lambda m: m, copy.deepcopy, saved):
        model = make(ours(net))
        assert set(model.fast_path().values()) == {"yes"}
        run_by_hand.clear()
        model(*images())
        assert sorted(set(run_by_hand)) == [k for k in model.fast_path() if k.startswith("slice")]


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, torch.enable_grad, lambda: torch.device("cpu")],
    ids=["no_grad", "inference_mode", "enable_grad", "a device"],
)
def test_under_a_context(context, run_by_hand):
    model = ours()
    with context():
        assert_says(model, {})
        model(*images())
    assert set(run_by_hand) == set(SLICES)


def test_with_a_default_device(run_by_hand):
    torch.set_default_device("cpu")
    try:
        assert_runs(ours(), run_by_hand, SLICES)
    finally:
        torch.set_default_device(None)


def test_with_a_model_built_in_inference_mode(run_by_hand):
    with torch.inference_mode():
        model = ours()
        model(*images())
    with torch.no_grad():
        model(*images())
    assert run_by_hand.count("slice3") == 2


def test_under_hooks_for_saved_tensors(run_by_hand):
    model = ours()
    _, expected = value_and_gradient(model, 0)
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: packed.append(x) or x.clone(), lambda x: x
    ):
        _, found = value_and_gradient(model, 0)
    assert packed and torch.equal(found, expected)
    assert set(run_by_hand) == set(SLICES)


def test_functional_call_uses_what_it_is_given(run_by_hand):
    model = ours()
    halved_weights = {k: 0.5 * v for k, v in model.state_dict().items() if k.startswith("net.")}
    expected = copy.deepcopy(model)
    expected.load_state_dict({**model.state_dict(), **halved_weights})
    before = model(*images())
    found = torch.func.functional_call(model, halved_weights, images())
    assert torch.equal(found, expected(*images()))
    assert torch.equal(model(*images()), before)
    assert run_by_hand.count("slice1") == 4


@pytest.mark.parametrize("kind", ["float64", "bfloat16", "float16"])
def test_other_dtypes_run_by_hand_where_they_are_served(kind, run_by_hand):
    from lpips_fast.trunk.legality import CPU_DTYPES

    dtype = getattr(torch, kind)
    expected = ours()(*images())
    model = ours().to(dtype)
    run_by_hand.clear()
    with torch.no_grad():
        value = model(*(x.to(dtype) for x in images()))
    assert relative(value.float(), expected) < 0.05
    if dtype in CPU_DTYPES:
        assert set(run_by_hand) == set(SLICES)
        assert_says(model, {})
    else:
        assert run_by_hand == []
        assert_says(model, dict.fromkeys(PARTS[:-1], f"there are no kernels for {dtype}"))


@needs(torch.bfloat16)
def test_autocast(run_by_hand):
    with torch.autocast("cpu", torch.bfloat16):
        ours()(*images())
    assert set(run_by_hand) == set(SLICES)


def test_a_learning_linear_layer_keeps_all_fast(run_by_hand):
    model = ours()
    for lin in model.lins:
        lin.requires_grad_()
    assert_says(model, {})
    assert_runs(model, run_by_hand, SLICES)


def test_replicas(run_by_hand):
    """As DataParallel makes them, whose parameters are plain tensors."""
    model = ours()
    expected = model(*images())
    replica = model._replicate_for_data_parallel()
    assert isinstance(replica, LPIPS)
    run_by_hand.clear()
    assert torch.allclose(replica(*images()), expected, rtol=1e-6)


def marked(model: LPIPS) -> None:
    for block in model.net.slices():
        block.note = "mine"
        block[-1]._is_wrapped = True


def test_marks_of_the_users_cost_nothing(run_by_hand):
    """That stand before nothing that a call reads, as frameworks leave them."""
    model = ours()
    marked(model)
    assert_says(model, {})
    assert_runs(model, run_by_hand, SLICES)


def test_an_attribute_that_stands_before_another_does(reference, run_by_hand):
    models = pair_of_models(reference)
    for model in models:
        conv = conv_of(model)
        conv.__dict__["weight"] = 0.5 * conv.weight
        model.net.slice3[1].stride = [1, 1]  # equal in effect, and no tuple
    slow = {"slice2": "has other attributes than as built: weight", "slice3": "has stride [1, 1]"}
    assert_says(models[0], slow)
    assert_runs(models[0], run_by_hand, ["slice1", "slice4", "slice5"])
    assert_follows(*models)


def test_the_module_of_a_fire_is_plain():
    """What is called as a module computes with torch's own operators alone."""
    fire = FireModule(8, 4, 6)
    x = torch.randn(1, 8, 5, 5, requires_grad=True)
    assert torch.autograd.gradcheck(fire.double(), x.double())
