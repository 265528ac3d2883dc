"""Packed copies of weights: never stale, whoever wrote and however; given back when they are."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import image_pair, relative, trunk_weights
from served import needs
from torch import Tensor, nn

from lpips_fast import LPIPS
from lpips_fast.kernels import WeightWatch
from lpips_fast.trunk import packing
from lpips_fast.trunk.convolution import Convolution, convolve, input_gradient
from lpips_fast.trunk.packing import is_packable, packed_weight

# By Winograd's algorithm, by oneDNN, directly, and in blocks of a stride.
KINDS = {"winograd": (64, 48, 3), "oneDNN": (8, 8, 3), "direct": (3, 64, 3), "1x1": (64, 16, 1)}


def convolution(kind: str = "winograd") -> nn.Conv2d:
    torch.manual_seed(0)
    channels_in, channels_out, kernel = KINDS[kind]
    return nn.Conv2d(channels_in, channels_out, kernel).requires_grad_(False)


def images_of(conv: nn.Conv2d) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(1, conv.in_channels, 11, 12)
    return x.contiguous(memory_format=torch.channels_last)


def packed(conv: nn.Conv2d) -> Convolution:
    return Convolution(conv.weight, conv.bias, 1, 0, packed_weight(conv.weight))


def error(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def is_right(conv: nn.Conv2d, x: Tensor, gradient: bool = True) -> bool:
    """Whether value and gradient are those of the weights as they are now."""
    x64 = x.double().requires_grad_()
    y64 = torch.conv2d(x64, conv.weight.double(), conv.bias.double())
    right = error(convolve(packed(conv), x), y64.detach().relu()) < 1e-5
    if gradient:
        grad = torch.ones_like(y64, dtype=torch.float32)
        grad = grad.contiguous(memory_format=torch.channels_last)
        (expected,) = torch.autograd.grad(y64, x64, grad.double())
        right = right and error(input_gradient(packed(conv), grad, x), expected) < 1e-5
    return right


# ------------------------------------------------------------------------------ ways of writing


def by_data(conv: nn.Conv2d) -> None:
    conv.weight.data.mul_(-2)


def by_numpy(conv: nn.Conv2d) -> None:
    conv.weight.detach().numpy()[:] *= -2


def by_an_alias(conv: nn.Conv2d) -> None:
    alias = conv.weight.data.as_strided((conv.weight.numel(),), (1,))
    alias.copy_(torch.randn(len(alias)))


def by_an_alias_of_old(conv: nn.Conv2d) -> None:
    """A view that was taken before, whose version counter is its own."""
    conv.weight.data.copy_(torch.randn(conv.weight.shape))


def by_an_optimizer(conv: nn.Conv2d) -> None:
    """Whose parameter is a detached alias, as a sharded optimizer's master copy."""
    alias = nn.Parameter(conv.weight.data)
    optimizer = torch.optim.Adam([alias], lr=1.0)
    alias.grad = torch.randn(alias.shape)
    optimizer.step()


def as_broadcast(conv: nn.Conv2d) -> None:
    """What ``dist.broadcast(p.data)`` does: bytes from elsewhere, by the address alone."""
    source = torch.randn(conv.weight.shape)
    target = numpy.ctypeslib.as_array(
        (numpy.ctypeslib.ctypes.c_float * conv.weight.numel()).from_address(conv.weight.data_ptr())
    )
    target[:] = source.flatten().numpy()


def by_set(conv: nn.Conv2d) -> None:
    with torch.no_grad():
        conv.weight.set_(torch.randn(conv.weight.shape))


def by_set_of_data(conv: nn.Conv2d) -> None:
    conv.weight.data.set_(torch.randn(conv.weight.shape))


def by_assigned_data(conv: nn.Conv2d) -> None:
    conv.weight.data = torch.randn(conv.weight.shape)


def by_a_new_parameter(conv: nn.Conv2d) -> None:
    conv.weight = nn.Parameter(torch.randn(conv.weight.shape), requires_grad=False)


def by_its_storage(conv: nn.Conv2d) -> None:
    new = torch.randn(conv.weight.shape)
    conv.weight.untyped_storage().copy_(new.untyped_storage())


def by_a_storage_resized(conv: nn.Conv2d) -> None:
    """As FSDP frees and fills again."""
    storage, size = conv.weight.untyped_storage(), conv.weight.untyped_storage().nbytes()
    storage.resize_(0)
    storage.resize_(size)
    conv.weight.data.copy_(torch.randn(conv.weight.shape))


def by_one_filter(conv: nn.Conv2d) -> None:
    conv.weight.data[conv.out_channels // 2] = torch.randn(conv.weight.shape[1:])


def by_one_input_channel(conv: nn.Conv2d) -> None:
    conv.weight.data[:, conv.in_channels // 2] = 3.0


def by_half_precision_and_back(conv: nn.Conv2d) -> None:
    conv.half().float()


def by_the_version(conv: nn.Conv2d) -> None:
    conv.weight.mul_(2)
    conv.weight[1, -1, -1, -1] = 7.0  # one element, by a way that torch counts


def by_loading(conv: nn.Conv2d) -> None:
    conv.load_state_dict({k: torch.randn(v.shape) for k, v in conv.state_dict().items()})


def by_assigning(conv: nn.Conv2d) -> None:
    state = {k: torch.randn(v.shape) for k, v in conv.state_dict().items()}
    conv.load_state_dict(state, assign=True)
    conv.requires_grad_(False)


def by_another_memory_order(conv: nn.Conv2d) -> None:
    conv.to(memory_format=torch.channels_last)
    conv.weight.data.mul_(2)


def by_a_transposition(conv: nn.Conv2d) -> None:
    """The same bytes in another order of the axes."""
    if conv.in_channels == conv.out_channels:
        conv.weight.data = conv.weight.data.transpose(0, 1).contiguous().clone()


def by_swapped_filters(conv: nn.Conv2d) -> None:
    conv.weight.data[[0, 1]] = conv.weight.data[[1, 0]]


def by_signs_of_zeros(conv: nn.Conv2d) -> None:
    conv.weight.data.zero_()
    conv.weight.data.neg_()


WAYS = [
    by_data,
    by_numpy,
    by_an_alias,
    by_an_alias_of_old,
    by_an_optimizer,
    as_broadcast,
    by_set,
    by_set_of_data,
    by_assigned_data,
    by_a_new_parameter,
    by_its_storage,
    by_a_storage_resized,
    by_one_filter,
    by_one_input_channel,
    by_half_precision_and_back,
    by_the_version,
    by_loading,
    by_assigning,
    by_another_memory_order,
    by_a_transposition,
    by_swapped_filters,
    by_signs_of_zeros,
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", WAYS)
def test_a_write_is_seen_at_once(write, kind):
    """By the next call, without a warning: that is for what was found late."""
    conv = convolution(kind)
    x = images_of(conv)
    assert is_right(conv, x)
    for _ in range(2):
        write(conv)
        assert is_right(conv, x)


@pytest.mark.parametrize("kind", KINDS)
def test_every_single_filter_and_channel_is_seen_at_once(kind):
    conv = convolution(kind)
    x = images_of(conv)
    for k in range(conv.out_channels):
        packed_weight(conv.weight)
        conv.weight.data[k] += 1
        assert is_right(conv, x, gradient=False), k
    for k in range(conv.in_channels):
        packed_weight(conv.weight)
        conv.weight.data[:, k] -= 1
        assert is_right(conv, x, gradient=False), k


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_element_is_found_within_rounds_with_a_warning(kind):
    conv = convolution(kind)
    x = images_of(conv)
    generator = torch.Generator().manual_seed(0)
    found_late = 0
    for _ in range(12):
        is_right(conv, x)
        rounds = packed_weight(conv.weight).rounds
        element = torch.randint(conv.weight.numel(), (1,), generator=generator).item()
        conv.weight.data.view(-1)[element] += 50
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(rounds):
                packed_weight(conv.weight)
                if caught:
                    break
            assert is_right(conv, x)
        if caught:
            found_late += 1
            assert len(caught) == 1 and "behind torch's version counter" in str(caught[0].message)
            assert f"within the last {rounds} calls" in str(caught[0].message)
    assert found_late > 0 or conv.weight.shape[2] == 1


def test_repack_has_a_single_element_seen_at_once():
    model = LPIPS(weights=trunk_weights("alex"), verbose=False)
    image, target = image_pair(1, 64, 64, torch.float32, 0)
    before = model(image, target)
    for parameter in model.net.parameters():
        parameter.data.view(-1)[parameter.numel() // 2] += 3
    model.repack()
    found, fresh = model(image, target), copy.deepcopy(model)(image, target)
    assert torch.equal(found, fresh) and not torch.equal(found, before)


def test_biases_are_read_as_they_are():
    model = LPIPS(weights=trunk_weights("alex"), verbose=False)
    image, target = image_pair(1, 64, 64, torch.float32, 0)
    model(image, target)
    for name, parameter in model.net.named_parameters():
        if name.endswith("bias"):
            parameter.data.view(-1)[3] += 3  # one element
            assert torch.equal(model(image, target), copy.deepcopy(model)(image, target)), name


@pytest.mark.parametrize("net", ["alex", "squeeze"])
@pytest.mark.parametrize("frozen_image", [True, False])
def test_an_average_of_weights_in_a_whole_model(net, frozen_image):
    """As a teacher follows a student, by ``.data``."""
    teacher = LPIPS(net=net, weights=trunk_weights(net), verbose=False)
    student = LPIPS(net=net, weights=trunk_weights(net, seed=1), verbose=False)
    image, target = image_pair(1, 64, 64, torch.float32, 0)
    image.requires_grad_(not frozen_image)
    for _ in range(3):
        for a, b in zip(teacher.net.parameters(), student.net.parameters()):
            a.data.mul_(0.5).add_(b.data, alpha=0.5)
        value, expected = teacher(image, target), copy.deepcopy(teacher)(image, target)
        assert torch.equal(value, expected)
        if not frozen_image:
            grads = [torch.autograd.grad(v.sum(), image)[0] for v in (value, expected)]
            assert torch.equal(*grads)


def test_a_write_between_forward_and_backward():
    """By a way that torch does not count, backward uses what lies there, as torch's own does."""
    model = LPIPS(weights=trunk_weights("alex"), verbose=False).requires_grad_(False)
    image, target = image_pair(1, 64, 64, torch.float32, 0)
    image.requires_grad_()
    by_modules = copy.deepcopy(model)
    for block in by_modules.net.slices():
        block.register_forward_hook(lambda *_: None)
    grads = []
    for each in (model, by_modules):
        value = each(image, target).sum()
        for parameter in each.net.parameters():
            parameter.data.mul_(0.5)
        grads.append(torch.autograd.grad(value, image)[0])
    assert relative(*grads) < 1e-3


# ------------------------------------------------------------------- copies, memory, and threads


def test_copies_share_nothing():
    conv = convolution()
    x = images_of(conv)
    y = convolve(packed(conv), x)
    others = [copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))]
    for other in others:
        assert packed_weight(other.weight) is not packed_weight(conv.weight)
        assert torch.equal(convolve(packed(other), x), y)
        other.weight.data.mul_(2)
        assert is_right(other, x) and is_right(conv, x)
    assert torch.equal(convolve(packed(conv), x), y)


def test_views_of_one_memory_share_what_was_packed():
    """Detached, as slices take them: packed once, not at every call."""
    conv = convolution()
    first = packed_weight(conv.weight)
    assert packed_weight(conv.weight.detach()) is first
    assert packed_weight(conv.weight.data) is not None


def test_the_same_memory_as_another_shape():
    memory = torch.randn(64 * 64 * 9)
    x = torch.randn(1, 64, 11, 12).contiguous(memory_format=torch.channels_last)
    for shape in [(64, 64, 3, 3), (576, 64, 1, 1), (64, 64, 3, 3)]:
        conv = nn.Conv2d(shape[1], shape[0], shape[2]).requires_grad_(False)
        conv.weight = nn.Parameter(memory.view(shape), requires_grad=False)
        assert is_right(conv, x)
    conv.weight.data = memory.view(64, 3, 3, 64).permute(0, 3, 1, 2)  # channels-last
    assert is_packable(conv.weight) and is_right(conv, x)


@pytest.mark.usefixtures("usual_allocator")
def test_freed_memory_never_answers():
    """A new weight where an old one lay, of the same shape and version."""
    x = images_of(convolution())
    addresses = set()
    for seed in range(20):
        torch.manual_seed(seed)
        conv = nn.Conv2d(64, 48, 3).requires_grad_(False)
        addresses.add(conv.weight.data_ptr())
        assert is_right(conv, x)
        del conv
    assert len(addresses) < 20, "the memory was never taken again: this test saw nothing"


def test_memory_is_given_back_when_a_weight_goes():
    conv = convolution()
    convolve(packed(conv), images_of(conv))
    entry = weakref.ref(packed_weight(conv.weight))
    assert entry() is not None
    del conv
    gc.collect()
    assert entry() is None


def test_memory_is_given_back_when_a_model_goes():
    gc.collect()
    before = len(packing._PACKED)
    model = LPIPS(weights=trunk_weights("alex"), verbose=False)
    image, target = image_pair(1, 64, 64, torch.float32, 0)
    model(image.requires_grad_(), target).sum().backward()
    entries = [weakref.ref(packed_weight(p)) for p in model.net.parameters() if p.dim() == 4]
    assert len(entries) == 5 and len(packing._PACKED) == before + 5
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and all(entry() is None for entry in entries)
    assert len(packing._PACKED) <= before


def test_replaced_weights_do_not_pile_up():
    conv = convolution()
    x = images_of(conv)
    for _ in range(50):
        conv.weight = nn.Parameter(torch.randn(conv.weight.shape), requires_grad=False)
        convolve(packed(conv), x)
        conv.weight.data = torch.randn(conv.weight.shape)
        convolve(packed(conv), x)
    gc.collect()
    packed_weight(convolution("oneDNN").weight)  # which throws out what is gone
    assert sum(p._storage.expired() for p in packing._PACKED.values()) == 0


def test_written_weights_do_not_pile_up():
    """As a teacher's, whose weights are written at every step of a long training."""
    model = LPIPS(weights=trunk_weights("alex"), verbose=False)
    image, target = image_pair(1, 40, 40, torch.float32, 0)
    counts = []
    for step in range(30):
        for parameter in model.net.parameters():
            parameter.data.mul_(0.999)
        model(image, target)
        if step in (9, 29):
            gc.collect()
            counts.append((len(packing._PACKED), len(packing._OF_SLICES), len(finalizers())))
    assert counts[0] == counts[1]


def test_replaced_weights_of_a_slice_do_not_pile_up():
    """Of a slice of several convolutions, whose first stays."""
    model = LPIPS(net="vgg", weights=trunk_weights("vgg"), verbose=False, layers=(0, 1))
    image, target = image_pair(1, 20, 20, torch.float32, 0)
    conv = model.net.slice2[-2]
    counts = []
    for step in range(20):
        conv.weight = nn.Parameter(torch.randn(conv.weight.shape), requires_grad=False)
        model(image, target)
        if step in (9, 19):
            gc.collect()
            counts.append((len(packing._PACKED), len(packing._OF_SLICES), len(finalizers())))
    assert counts[0] == counts[1]


def finalizers() -> list[Any]:
    return [f for f in weakref.finalize._registry if f.alive]


def test_tensors_are_free_to_be_swapped():
    """``torch.__future__.set_swap_module_params_on_conversion`` swaps none that has a weak ref."""
    model = LPIPS(weights=trunk_weights("alex"), verbose=False).requires_grad_(False)
    image, target = image_pair(1, 64, 64, torch.float32, 0)
    with torch.no_grad():  # a graph would hold the linear weights
        expected = model(image, target)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.no_grad():
            model.double()
            value = model(image.double(), target.double())
            model.float()
            other = LPIPS(weights=trunk_weights("alex", seed=1), verbose=False)
            assert torch.equal(model(image, target), expected)
            model.load_state_dict(other.state_dict())
            assert torch.equal(model(image, target), other(image, target))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert relative(value.float(), expected) < 1e-5


def test_packed_copies_are_no_part_of_the_module():
    model = LPIPS(weights=trunk_weights("alex"), verbose=False)
    keys, size = list(model.state_dict()), len(pickle.dumps(model))
    model(*image_pair(1, 64, 64, torch.float32, 0))
    # What a notice has seen takes a byte or two.
    assert list(model.state_dict()) == keys and abs(len(pickle.dumps(model)) - size) < 100
    assert all(p.is_contiguous() for p in model.parameters())


@needs(torch.bfloat16)
def test_both_dtypes_stay_packed(monkeypatch):
    conv = convolution("oneDNN")
    x = images_of(conv)
    for _ in range(2):
        convolve(packed(conv), x)
        convolve(packed(conv), x.bfloat16())
    purposes = set(packed_weight(conv.weight)._copies)
    assert {("forward", torch.float32), ("forward", torch.bfloat16)} <= purposes


def test_packing_happens_once(monkeypatch):
    model = LPIPS(weights=trunk_weights("alex"), verbose=False)
    image, target = image_pair(1, 64, 64, torch.float32, 0)
    image.requires_grad_()
    model(image, target).sum().backward()
    made: list[Any] = []
    plain = packing.PackedWeight.copy

    def counting(self: Any, purpose: Any, pack: Callable[[], Tensor]) -> Tensor:
        return plain(self, purpose, lambda: made.append(purpose) or pack())

    monkeypatch.setattr(packing.PackedWeight, "copy", counting)
    for _ in range(5):
        model(image, target).sum().backward()
        model(image.detach(), target)
    assert made == []


def test_threads():
    """Many call while one writes: every answer is that of some weights that were there."""
    model = LPIPS(weights=trunk_weights("alex"), verbose=False).requires_grad_(False)
    image, target = image_pair(1, 64, 64, torch.float32, 0)
    states = [model.net.slice3[1].weight.detach().clone() for _ in range(2)]
    states[1] *= -1
    allowed = []
    with torch.no_grad():
        for state in states:
            model.net.slice3[1].weight.data.copy_(state)
            allowed.append(model(image, target).item())
    wrong: list[float] = []
    stop = threading.Event()

    def call() -> None:
        with torch.no_grad():
            while not stop.is_set():
                copied = copy.deepcopy(model) if torch.rand(()).item() < 0.1 else model
                copied(image, target)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(10):
            model.net.slice3[1].weight.data.copy_(states[turn % 2])
            with torch.no_grad():  # after the write, in the same thread: the new weights alone
                value = model(image, target).item()
            if value != allowed[turn % 2]:
                wrong.append(value)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_threads_pack_the_same():
    model = LPIPS(weights=trunk_weights("alex"), verbose=False)
    image, target = image_pair(1, 64, 64, torch.float32, 0)
    with torch.no_grad():
        expected = copy.deepcopy(model)(image, target)
    results: list[Tensor] = []
    barrier = threading.Barrier(6)

    def call() -> None:
        barrier.wait()
        with torch.no_grad():
            results.append(model(image, target))

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6 and all(torch.equal(r, expected) for r in results)


# --------------------------------------------------------------------------------- at random


STEPS = st.lists(
    st.tuples(st.sampled_from(WAYS), st.integers(0, 2**31 - 1)), min_size=1, max_size=8
)


@given(steps=STEPS, kind=st.sampled_from(sorted(KINDS)))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_order_of_writes(steps, kind):
    conv = convolution(kind)
    x = images_of(conv)
    for write, seed in steps:
        torch.manual_seed(seed)
        write(conv)
        assert is_right(conv, x), write.__name__


class TestWatch:
    """``csrc/weight_watch.h`` by itself."""

    def watch(self, weight: Tensor) -> WeightWatch:
        return WeightWatch(
            weight.data_ptr(), weight.element_size(), list(weight.shape), list(weight.stride())
        )

    @given(
        shape=st.tuples(
            st.integers(1, 70), st.integers(1, 70), st.integers(1, 5), st.integers(1, 5)
        ),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.float16]),
        last=st.booleans(),
        data=st.data(),
    )
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    def test_any_element_within_rounds(self, shape, dtype, last, data):
        order = torch.channels_last if last else torch.contiguous_format
        weight = torch.randn(shape).to(dtype).contiguous(memory_format=order)
        watch = self.watch(weight)
        for _ in range(watch.rounds + 1):
            assert watch.look(weight.data_ptr()) == 0
        position = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
        bits = weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
        bits[position] ^= 1 << data.draw(st.integers(0, 8 * weight.element_size() - 2))
        assert any(watch.look(weight.data_ptr()) for _ in range(watch.rounds))

    @pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
    @pytest.mark.parametrize("shape", [(64, 3, 11, 11), (7, 70, 3, 3), (70, 7, 1, 1), (1, 1, 5, 5)])
    def test_any_filter_or_channel_at_once(self, shape, order):
        weight = torch.randn(shape).contiguous(memory_format=order)
        watch = self.watch(weight)
        for axis in (0, 1):
            for k in range(shape[axis]):
                changed = weight.clone(memory_format=torch.preserve_format)
                changed.select(axis, k).add_(1)
                assert watch.look(changed.data_ptr()) == 1

    def test_moved_memory_is_the_same_weight(self):
        weight = torch.randn(8, 8, 3, 3)
        watch, elsewhere = self.watch(weight), weight.clone()
        assert all(watch.look(elsewhere.data_ptr()) == 0 for _ in range(watch.rounds))

    def test_bits_are_compared_not_values(self):
        """0 and -0 are equal, and 1 / 0 and 1 / -0 are not; NaN is itself."""
        weight = torch.zeros(8, 8, 3, 3)
        watch = self.watch(weight)
        weight.neg_()
        assert watch.look(weight.data_ptr()) != 0
        weight.fill_(float("nan"))
        watch = self.watch(weight)
        assert all(watch.look(weight.data_ptr()) == 0 for _ in range(watch.rounds))

    def test_rounds_are_few(self):
        """256 chunks or so at most, whatever the size: what the warning and the docs say."""
        for shape in [(64, 3, 11, 11), (384, 192, 3, 3), (512, 512, 3, 3)]:
            weight = torch.zeros(shape)
            assert 1 <= self.watch(weight).rounds <= 258

    def test_nothing_to_watch(self):
        weight = torch.empty(0, 3, 3, 3)
        with contextlib.suppress(RuntimeError):
            assert self.watch(weight).look(weight.data_ptr()) == 0
