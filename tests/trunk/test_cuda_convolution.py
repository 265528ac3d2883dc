"""Which convolution runs on CUDA, without a GPU: cuDNN's call and our kernel are played on the CPU.

What a GPU alone can show (that cuDNN has the engines, and speed) is in tests/kernels/test_cuda.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from parity import image_pair, trunk_weights
from torch import Tensor

import lpips_fast
from lpips_fast import kernels
from lpips_fast.comparison import routes
from lpips_fast.trunk import cuda_convolution, fire, slices
from lpips_fast.trunk.convolution import Convolution
from lpips_fast.trunk.cuda_convolution import CHOICES, convolve, describe_choices

SHAPES = [  # in, out, kernel, stride, padding
    (3, 64, 11, 4, 2),
    (3, 16, 3, 2, 0),
    (33, 65, 3, 1, 1),
    (64, 16, 1, 1, 0),
]
NO_ENGINE = RuntimeError("GET was unable to find an engine to execute this computation")


class Device:
    """Plays cuDNN and our kernel: counts their calls, and does with them what it is told to."""

    def __init__(self) -> None:
        self.fused = self.two_passes = 0
        self.refusal: Exception | None = None
        self.reads_operand = False  # an engine that multiplies unwritten memory by 0
        self.seconds = [1.0, 2.0]  # of the fused call, of the two passes
        self.is_capturing = False
        self.poisoned: list[torch.Size] = []  # memory that was filled with NaN and let go of

    def cudnn_convolution_relu(self, x, weight, bias, stride, padding, dilation, groups) -> Tensor:
        self.fused += 1
        if self.refusal is not None:
            raise self.refusal
        y = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
        if self.reads_operand and y.shape in self.poisoned:
            y = y + torch.nan
        return torch.where(y > 0, y, torch.zeros_like(y))  # NaN is lost

    def bias_relu_(self, y: Tensor, bias: Tensor) -> None:
        assert y.is_contiguous(memory_format=torch.channels_last)
        self.two_passes += 1
        y.add_(bias.view(1, -1, 1, 1)).relu_()

    def scale_images_flagged(self, images, shift, scale, unit_range, dtype):
        batch = torch.ops.lpips_fast.scale_images(images, shift, scale, unit_range, dtype)
        is_finite = batch.isfinite().flatten(1).all(dim=1)
        return batch, torch.zeros(len(batch)).masked_fill(~is_finite, torch.nan)

    def seconds_in_turn(self, calls) -> list[float]:
        assert len(calls) == 2
        return self.seconds

    def calls(self) -> tuple[int, int]:
        """Fused calls and pairs of passes since it was asked last."""
        counts = self.fused, self.two_passes
        self.fused = self.two_passes = 0
        return counts


FUSED, TWO_PASSES = (1, 0), (0, 1)
TRIAL = (1, 1)  # and with the call itself:
TRIAL_THEN_FUSED, TRIAL_THEN_TWO_PASSES = (2, 1), (1, 2)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    played = Device()
    poison = cuda_convolution._leave_nan_in_free_memory

    def leave_nan(like: Tensor) -> None:
        poison(like)
        played.poisoned.append(like.shape)

    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(cuda_convolution, "_seconds_in_turn", played.seconds_in_turn)
    monkeypatch.setattr(cuda_convolution, "_is_capturing", lambda: played.is_capturing)
    monkeypatch.setattr(cuda_convolution, "_leave_nan_in_free_memory", leave_nan)
    cuda_convolution.forget_choices()
    monkeypatch.setattr(routes, "_flags_images", lambda call, image: False)
    with (
        torch.library._scoped_library("aten", "IMPL") as aten,
        torch.library._scoped_library("lpips_fast", "IMPL") as ours,
    ):
        aten.impl("cudnn_convolution_relu", played.cudnn_convolution_relu, "CPU")
        ours.impl("bias_relu_", played.bias_relu_, "CPU")
        ours.impl("scale_images_flagged", played.scale_images_flagged, "CPU")
        yield played
    cuda_convolution.forget_choices()


def frozen(
    in_channels=8, out_channels=4, kernel=3, stride=1, padding=0, dtype=torch.float32
) -> Convolution:
    weight = torch.randn(out_channels, in_channels, kernel, kernel) / (in_channels * kernel**2)
    weight = weight.to(dtype, memory_format=torch.channels_last)
    bias = 0.1 * torch.randn(out_channels).to(dtype)
    return Convolution(weight, bias, stride, padding, None)  # type: ignore[arg-type]


def image(conv: Convolution, shape=(2, 19, 23)) -> Tensor:
    x = torch.randn(shape[0], conv.in_channels, *shape[1:], dtype=conv.weight.dtype)
    return x.contiguous(memory_format=torch.channels_last)


def exact(conv: Convolution, x: Tensor) -> Tensor:
    weight, bias = conv.weight.double(), conv.bias.double()
    return torch.conv2d(x.double(), weight, bias, conv.stride, conv.padding)


def error(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", ["fused", "no engine", "keep_nan"])
def test_value_and_image_gradient(device, shape, way):
    if way == "no engine":
        device.refusal = NO_ENGINE
    conv = frozen(*shape)
    x = image(conv)
    y = convolve(conv, x, keep_nan=way == "keep_nan")
    assert (
        device.calls()
        == {
            "fused": TRIAL_THEN_FUSED,
            "no engine": TRIAL_THEN_TWO_PASSES,
            "keep_nan": TWO_PASSES,
        }[way]
    )
    assert error(y, exact(conv, x).relu()) < 1e-6
    assert torch.equal(convolve(conv, x, keep_nan=way == "keep_nan"), y)
    grad = torch.randn_like(y)
    leaf = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(exact(conv, leaf), leaf, grad.double())
    add = torch.randn_like(x)
    got = cuda_convolution.input_gradient(conv, grad, x)
    assert error(got, expected) < 1e-5
    got = cuda_convolution.input_gradient(conv, grad, x, through_relu=True, add=add)
    assert error(got, (expected + add) * (x > 0)) < 1e-5


class TestTrial:
    def test_the_faster_way_is_kept_for_the_shape(self, device):
        conv = frozen()
        for seconds, first, later in (
            ([1.0, 2.0], TRIAL_THEN_FUSED, FUSED),
            ([2.0, 1.0], TRIAL_THEN_TWO_PASSES, TWO_PASSES),
        ):
            cuda_convolution.forget_choices()
            device.seconds = seconds
            x = image(conv)
            convolve(conv, x)
            assert device.calls() == first
            device.seconds = seconds[::-1]  # it is not measured again
            for _ in range(3):
                convolve(conv, image(conv))
                assert device.calls() == later
            convolve(conv, image(conv, (1, 9, 9)))  # another shape is
            assert device.calls() != later

    def test_an_engine_that_reads_unwritten_memory_is_seen(self, device):
        device.reads_operand = True
        conv = frozen()
        x = image(conv)
        y = convolve(conv, x)
        assert device.calls() == TRIAL_THEN_TWO_PASSES
        assert error(y, exact(conv, x).relu()) < 1e-6
        (choice,) = CHOICES.values()
        assert choice == (False, "cuDNN's result is wrong")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_rounding_is_no_disagreement(self, device, dtype):
        conv = frozen(64, 64, dtype=dtype)
        y = cuda_convolution._in_two_passes(conv, image(conv))
        for close in (1 + torch.finfo(dtype).eps, 1 + 4 * torch.finfo(dtype).eps):
            assert cuda_convolution._agree(y * close, y)
        for wrong in (torch.zeros_like(y), y + torch.nan, y.flip(0)):
            assert not cuda_convolution._agree(wrong, y)

    def test_the_choice_does_not_depend_on_the_images(self, device):
        """Nor does the trial touch the random numbers of others."""
        conv = frozen()
        before = torch.random.get_rng_state()
        convolve(conv, torch.full_like(image(conv), torch.nan))
        (choice,) = CHOICES.values()
        assert choice.fused
        image(conv)
        torch.random.set_rng_state(before)
        first = torch.rand(3)
        torch.random.set_rng_state(before)
        cuda_convolution.forget_choices()
        convolve(conv, torch.zeros(2, 8, 9, 9).contiguous(memory_format=torch.channels_last))
        assert torch.equal(torch.rand(3), first)

    def test_layers_are_tried_apart(self, device):
        x = image(frozen())
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for conv in (frozen(), frozen(stride=2), frozen(padding=1), frozen(out_channels=5)):
                convolve(conv, x)
                assert device.calls() == TRIAL_THEN_FUSED
            convolve(frozen(), x)  # other weights of the same shape
            assert device.calls() == FUSED
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            convolve(frozen(), x)
            assert device.calls() == TRIAL_THEN_FUSED
            half = frozen(dtype=torch.bfloat16)
            convolve(half, image(half))
            assert device.calls() == TRIAL_THEN_FUSED

    def test_ever_other_sizes_are_not_tried(self, device, monkeypatch):
        monkeypatch.setattr(cuda_convolution, "MOST_SHAPES", 2)
        conv = frozen()
        for side in (8, 9):
            convolve(conv, image(conv, (1, side, side)))
            assert device.calls() == TRIAL_THEN_FUSED
        for side in (10, 11, 10):
            convolve(conv, image(conv, (1, side, side)))
            assert device.calls() == TWO_PASSES
        convolve(conv, image(conv, (1, 8, 8)))
        assert device.calls() == FUSED

    def test_not_while_a_graph_is_captured(self, device):
        conv = frozen()
        device.is_capturing = True
        convolve(conv, image(conv))
        assert device.calls() == TWO_PASSES and not CHOICES
        device.is_capturing = False
        convolve(conv, image(conv))
        assert device.calls() == TRIAL_THEN_FUSED
        device.is_capturing = True
        convolve(conv, image(conv))
        assert device.calls() == FUSED

    def test_what_was_chosen_can_be_read(self, device):
        conv = frozen()
        convolve(conv, image(conv))
        device.refusal = NO_ENGINE
        convolve(conv, image(conv, (1, 9, 9)))
        fused, two = describe_choices()
        assert fused == (
            "4×8×3×3, stride 1, of 2×8×19×23 float32: fused "
            "(fused 1000000.0 µs, two passes 2000000.0 µs)"
        )
        assert two == "4×8×3×3, stride 1, of 1×8×9×9 float32: two passes (cuDNN has no engine)"


class TestErrors:
    @pytest.mark.parametrize("words", [str(NO_ENGINE), "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"])
    def test_a_missing_engine_is_remembered(self, device, words):
        device.refusal = RuntimeError(words)
        conv = frozen()
        convolve(conv, image(conv))
        assert device.calls() == TRIAL_THEN_TWO_PASSES
        device.refusal = None
        convolve(conv, image(conv))
        assert device.calls() == TWO_PASSES

    def test_an_error_that_passes_is_not(self, device):
        conv = frozen()
        x = image(conv)
        device.refusal = RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR")
        assert error(convolve(conv, x), exact(conv, x).relu()) < 1e-6
        assert device.calls() == TRIAL_THEN_TWO_PASSES and not CHOICES
        device.refusal = None
        convolve(conv, x)
        assert device.calls() == TRIAL_THEN_FUSED

    def test_an_error_that_stays_is(self, device):
        conv = frozen()
        device.refusal = RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR\nmore of it")
        for _ in range(3):
            convolve(conv, image(conv))
            assert device.calls() == TRIAL_THEN_TWO_PASSES
        convolve(conv, image(conv))
        assert device.calls() == TWO_PASSES
        (line,) = describe_choices()
        assert line.endswith(
            "two passes (failed 3 times: cuDNN error: CUDNN_STATUS_INTERNAL_ERROR)"
        )

    def test_an_error_after_the_trial_has_it_tried_again(self, device):
        conv = frozen()
        x = image(conv)
        convolve(conv, x)
        device.calls()
        device.refusal = RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        assert error(convolve(conv, x), exact(conv, x).relu()) < 1e-6
        assert device.calls() == (1, 1) and not CHOICES
        device.refusal = None
        convolve(conv, x)
        assert device.calls() == TRIAL_THEN_FUSED

    def test_short_memory_in_the_trial_is_no_choice(self, device):
        conv = frozen()
        device.refusal = torch.OutOfMemoryError("CUDA out of memory")
        convolve(conv, image(conv))
        assert device.calls() == TRIAL_THEN_TWO_PASSES and not CHOICES
        device.refusal = None
        convolve(conv, image(conv))
        device.refusal = torch.OutOfMemoryError("CUDA out of memory")
        with pytest.raises(torch.OutOfMemoryError):  # halves batches, further up
            convolve(conv, image(conv))
        assert CHOICES

    def test_wrong_arguments_are_told(self, device):
        device.refusal = RuntimeError("cuDNN error")
        with pytest.raises(RuntimeError, match=r"expected input.* to have 8 channels"):
            for _ in range(4):
                convolve(frozen(), torch.randn(1, 5, 9, 9))
        assert device.fused == 0


class TestWhereFusingIsNotWanted:
    def way(self, device, conv) -> str:
        cuda_convolution.forget_choices()
        device.calls()
        convolve(conv, image(conv))
        return {TRIAL_THEN_FUSED: "fused", TWO_PASSES: "two passes"}[device.calls()]

    def test_deterministic_algorithms(self, device, poisoned):
        conv = frozen()
        assert self.way(device, conv) == "two passes"
        torch.use_deterministic_algorithms(False)
        assert self.way(device, conv) == "fused"
        with torch.backends.cudnn.flags(enabled=True, deterministic=True):
            assert self.way(device, conv) == "two passes"

    def test_cudnn_disabled_or_absent(self, device, monkeypatch):
        conv = frozen()
        with torch.backends.cudnn.flags(enabled=False):
            assert self.way(device, conv) == "two passes"
        assert self.way(device, conv) == "fused"
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
        assert self.way(device, conv) == "two passes"

    def test_more_elements_than_32_bits_count(self, device):
        conv = frozen(3, 64, padding=1)
        for side, fits in ((1024, True), (8192, False)):  # 64 * 8192^2 = 2^32
            x = torch.empty(1, 3, side, side, device="meta")
            assert cuda_convolution._cudnn_may_fuse(conv, x) is fits

    def test_nan_comes_through(self, device):
        conv = frozen(3, 8)
        x = image(conv)
        x[0, 1, 4, 4] = torch.nan
        assert convolve(conv, x, keep_nan=True).isnan().any()
        assert not convolve(conv, x).isnan().any()  # as this cuDNN has it

    def test_results_of_another_order(self, device, monkeypatch):
        """torch's convolution without cuDNN returns NCHW, which our kernel does not take."""
        conv = frozen(3, 8)
        plain = torch.conv2d
        monkeypatch.setattr(
            "torch.nn.functional.conv2d", lambda *arguments: plain(*arguments).contiguous()
        )
        x = image(conv)
        assert error(convolve(conv, x, keep_nan=True), exact(conv, x).relu()) < 1e-6
        assert device.two_passes == 0


@pytest.mark.parametrize("net", ["alex", "squeeze"])
@pytest.mark.parametrize("engine", [True, False])
def test_whole_model(device, net, engine, monkeypatch):
    """Value and gradient as by torch's own operators."""
    if not engine:
        device.refusal = NO_ENGINE
    model = lpips_fast.LPIPS(net=net, weights=trunk_weights(net), verbose=False)
    outcomes = []
    for served in (True, False):
        if served:
            monkeypatch.setattr(slices, "_backend", lambda x: cuda_convolution)
            monkeypatch.setattr(fire, "has_border", lambda x: False)
        else:
            monkeypatch.setattr(kernels, "is_eager", lambda: False)
        in0, in1 = image_pair(2, 67, 83, torch.float32, seed=0)
        in0.requires_grad_()
        value = model(in0, in1)
        (grad,) = torch.autograd.grad(value.sum(), in0)
        outcomes.append((value, grad))
        if served:
            assert device.fused > 0 and device.two_passes > 0
            assert all(choice.fused is engine for choice in CHOICES.values())
    (value, grad), (expected, expected_grad) = outcomes
    assert error(value, expected.double()) < 1e-5
    assert error(grad, expected_grad.double()) < 1e-4


@pytest.fixture
def flagging(device, monkeypatch) -> Device:
    """As on CUDA: convolutions by the played cuDNN, and images that scaling flags."""
    monkeypatch.setattr(slices, "_backend", lambda x: cuda_convolution)
    monkeypatch.setattr(fire, "has_border", lambda x: False)
    monkeypatch.setattr(
        routes, "_flags_images", lambda call, image: call.is_as_built and not call.model.spatial
    )
    return device


@pytest.mark.parametrize("spatial", [False, True], ids=["averaged", "map"])
def test_calls_of_a_training_step(flagging, spatial, monkeypatch):
    """AlexNet: one scaling, every convolution once for both images, one tap gradient a layer."""
    monkeypatch.setattr(routes, "_one_batch_below", lambda x: routes._ONE_BATCH_ON_CUDA)
    weights = trunk_weights("alex")
    model = lpips_fast.LPIPS(weights=weights, spatial=spatial, verbose=False)
    model.requires_grad_(False)
    in0, in1 = image_pair(2, 160, 170, torch.float32, seed=0)  # beyond what is small on the CPU
    in0.requires_grad_()
    model(in0, in1).sum().backward()  # tries the convolutions
    assert {shape[0] for _, shape in CHOICES} == {4}
    flagging.calls()
    in0.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(in0, in1).sum().backward()
    calls = Counter(event.name for event in profile.events())
    ours = {
        name.removeprefix("lpips_fast::"): count
        for name, count in calls.items()
        if name.startswith("lpips_fast::")
    }
    ours.pop("receptive_fields", None)  # of the CPU alone
    expected = {"scale_images": 1, "max_pool2d": 2, "max_pool2d_backward": 2, "tap_backward": 5}
    if spatial:  # the first convolution keeps NaN, and so goes in two passes
        assert ours == {**expected, "distance_map": 5, "bias_relu_": 1}
        assert flagging.calls() == (4, 1)
    else:  # the played kernel with flags calls the one without
        assert ours == {**expected, "distance": 5, "scale_images_flagged": 1}
        assert flagging.calls() == (5, 0)
    assert calls["aten::convolution_backward"] == 5
    # The gradients meet in tap_backward; a ReLU between two taps would be one more, and has none.
    assert calls["aten::threshold_backward"] == 0
    # Of distances alone, there and back: no image and no feature is copied.
    assert calls["aten::cat"] <= 2 and calls["aten::addcmul"] == (0 if spatial else 1)


class TestFlaggedImages:
    """cuDNN's fused call loses NaN, in the first slice too: scaling flags it instead."""

    @staticmethod
    def pair(batches=(3, 3), size=(64, 80)) -> tuple[Tensor, Tensor]:
        in0, _ = image_pair(batches[0], *size, torch.float32, seed=0)
        _, in1 = image_pair(batches[1], *size, torch.float32, seed=1)
        return in0, in1

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    @pytest.mark.parametrize("side", [0, 1])
    @pytest.mark.parametrize("graph", [None, 0, 1, "both"])
    @pytest.mark.parametrize("batches", [(3, 3), (3, 1), (1, 3)], ids=str)
    @pytest.mark.parametrize("streamed", [False, True])
    def test_the_distance_of_the_image_alone_is_nan(
        self, flagging, monkeypatch, bad, side, graph, batches, streamed
    ):
        if streamed:
            monkeypatch.setattr(routes, "_STREAMED_FROM", 0)
        model = lpips_fast.LPIPS(weights=trunk_weights("alex"), verbose=False)
        model.requires_grad_(False)
        pair = self.pair(batches)
        clean = model(*pair)
        at = len(pair[side]) - 1
        pair[side][at, 1, 20, 33] = bad
        is_bad = torch.arange(3) == at if len(pair[side]) == 3 else torch.ones(3, dtype=torch.bool)
        leaves = [x for k, x in enumerate(pair) if graph in (k, "both")]
        for leaf in leaves:
            leaf.requires_grad_()
        value, layers = model(*pair, retPerLayer=True)
        for part in (value, *layers):
            assert torch.equal(part.flatten().isnan(), is_bad)
        torch.testing.assert_close(value[~is_bad], clean[~is_bad], rtol=1e-5, atol=0)
        for leaf in leaves:
            (grad,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
            of_image = is_bad if len(leaf) == 3 else is_bad.any().view(1)
            assert torch.equal(grad.isnan().flatten(1).any(dim=1), of_image)
            assert bool(grad[~of_image].isfinite().all())

    @pytest.mark.parametrize("net", ["alex", "squeeze"])
    def test_same_bits_and_every_convolution_fused(self, flagging, net, monkeypatch):
        model = lpips_fast.LPIPS(net=net, weights=trunk_weights(net), verbose=False)
        in0, in1 = self.pair()
        in0.requires_grad_()
        outcomes = []
        for flags in (True, False):
            if not flags:
                monkeypatch.setattr(routes, "_flags_images", lambda call, image: False)
            cuda_convolution.forget_choices()
            model(in0, in1)
            flagging.calls()
            value = model(in0, in1)
            outcomes.append((value, *torch.autograd.grad(value.sum(), in0)))
            fused, two_passes = flagging.calls()
            assert fused > 0 and two_passes == (0 if flags else 1)
        assert all(torch.equal(x, y) for x, y in zip(*outcomes))

    def test_features_and_maps_take_it_from_the_tap(self, flagging):
        in0, in1 = self.pair()
        in0[1, 1, 20, 33] = torch.nan
        model = lpips_fast.LPIPS(weights=trunk_weights("alex"), verbose=False)
        value = model(model.encode(in0), in1).flatten()
        assert value.isnan().tolist() == [False, True, False]
        value = model(in0, model.encode(in1)).flatten()
        assert value.isnan().tolist() == [False, True, False]
        model = lpips_fast.LPIPS(weights=trunk_weights("alex"), spatial=True, verbose=False)
        maps = model(in0, in1).isnan()
        assert maps[1].any() and not maps[0].any() and not maps[1].all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_trunks(self, flagging, dtype):
        """With the gradients of a float16 trunk scaled inside."""
        model = lpips_fast.LPIPS(weights=trunk_weights("alex"), dtype=dtype, verbose=False)
        in0, in1 = self.pair()
        in0[1, 1, 20, 33] = torch.nan
        in0.requires_grad_()
        value = model(in0, in1)
        assert value.flatten().isnan().tolist() == [False, True, False]
        (grad,) = torch.autograd.grad(value.sum(), in0)
        assert grad.isnan().flatten(1).any(dim=1).tolist() == [False, True, False]
        assert bool(grad[[0, 2]].isfinite().all())


def test_off_in_the_environment(run_python):
    code = """
        import torch
        from lpips_fast import kernels
        class Everywhere:
            def run_on(self, device): return True
        kernels.dispatch.CUDA_KERNELS = Everywhere()
        print(*(kernels.has_trunk_kernels(torch.device(d)) for d in ("cpu", "cuda", "meta")))
        print(kernels.has_kernel(torch.device("cuda")))
    """
    for switch, on_cuda in (("0", "False"), ("1", "True")):
        printed = run_python(code, LPIPS_FAST_CUDA_TRUNK=switch).split()
        assert printed == ["True", on_cuda, "False", "True"]
