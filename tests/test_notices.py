"""What a model says by itself of values: once, of what is surely wrong, never of what is not."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator

import pytest
import torch
from parity import image_pair, trunk_weights
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lpips_fast
from lpips_fast.comparison.linear import linear_weight


def model_of(**options: object) -> lpips_fast.LPIPS:
    return lpips_fast.LPIPS(weights=trunk_weights("alex"), verbose=False, **options)


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    return image_pair(2, 48, 56, torch.float32, seed=0)


@pytest.fixture(scope="module")
def unit(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The same in [0, 1], which a call without ``normalize`` takes for something else."""
    return pair[0] / 2 + 0.5, pair[1] / 2 + 0.5


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


WRONG = {
    "[0, 1]": (lambda x: x / 2 + 0.5, {}, r"values from 0.* to .*pass normalize=True"),
    "0 to 255": (lambda x: (x + 1) * 127.5, {}, r"to 2\d\d.*expected \[-1, 1\].*x / 127\.5 - 1"),
    "255 with normalize": (lambda x: (x + 1) * 127.5, {"normalize": True}, r"expected \[0, 1\]"),
    "standardised": (lambda x: x * 2.5, {}, r"expected \[-1, 1\]"),
}
RIGHT = {
    "[-1, 1]": lambda a, b: (a, b),
    "overshooting": lambda a, b: (a * 1.6, b),
    "bright": lambda a, b: (0.3 + 0.2 * a, 0.3 + 0.2 * b),
    "constant": lambda a, b: (torch.ones_like(a), torch.zeros_like(b)),
    "black and white": lambda a, b: (-torch.ones_like(a), torch.ones_like(b)),
    "one bright": lambda a, b: (a, b / 2 + 0.5),
    "one constant": lambda a, b: (a / 2 + 0.5, torch.full_like(b, 0.5)),
    "empty": lambda a, b: (a[:0], b[:0]),
}


class TestRange:
    @pytest.mark.parametrize("name", WRONG)
    def test_is_noticed_once(self, pair: tuple[Tensor, Tensor], name: str) -> None:
        change, options, message = WRONG[name]
        model = model_of()
        images = [change(x) for x in pair]
        with pytest.warns(UserWarning, match=message) as caught:
            model(*images, **options)
            model(*images, **options)
        assert len(caught) == 1 and caught[0].filename == __file__

    @pytest.mark.parametrize("name", RIGHT)
    def test_no_false_alarm(self, pair: tuple[Tensor, Tensor], name: str, no_warning: None) -> None:
        model_of()(*RIGHT[name](*pair))

    def test_images_in_the_unit_range_with_normalize(
        self, unit: tuple[Tensor, Tensor], no_warning: None
    ) -> None:
        model_of()(*unit, normalize=True)
        model_of()(*(x.half() for x in unit), normalize=True)

    def test_the_first_call_alone(
        self, pair: tuple[Tensor, Tensor], unit: tuple[Tensor, Tensor], no_warning: None
    ) -> None:
        model = model_of()
        model(*pair)
        model(*unit)

    def test_what_shows_nothing_does_not_count(
        self, pair: tuple[Tensor, Tensor], unit: tuple[Tensor, Tensor]
    ) -> None:
        model = model_of()
        model(pair[0][:0], pair[1][:0])
        model(model.encode(pair[0]), model.encode(pair[1]))
        with pytest.warns(UserWarning, match="normalize=True"):
            model(*unit)

    def test_never_and_always(self, unit: tuple[Tensor, Tensor]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model_of(check_inputs=False)(*unit)
        always = model_of(check_inputs=True)
        for _ in range(2):
            with pytest.warns(UserWarning, match="normalize=True"):
                always(*unit)

    @pytest.mark.parametrize("way", ["copy", "deepcopy", "replica"])
    def test_one_notice_for_copies(self, unit: tuple[Tensor, Tensor], way: str) -> None:
        model = model_of()
        if way == "replica":
            other = model._replicate_for_data_parallel()
            for key, child in model._modules.items():
                other._modules[key] = child
        else:
            other = getattr(copy, way)(model)
        with pytest.warns(UserWarning, match="normalize=True") as caught:
            other(*unit)
            model(*unit)
        assert len(caught) == 1

    def test_a_pickle_remembers(
        self, pair: tuple[Tensor, Tensor], unit: tuple[Tensor, Tensor]
    ) -> None:
        model = model_of()
        with pytest.warns(UserWarning, match="normalize=True"):
            pickle.loads(pickle.dumps(model))(*unit)
        model(*pair)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pickle.loads(pickle.dumps(model))(*unit)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    @pytest.mark.parametrize("way", ["compile", "export", "trace", "vmap", "meta", "fake"])
    def test_values_are_read_in_eager_calls_alone(
        self, unit: tuple[Tensor, Tensor], way: str
    ) -> None:
        model = model_of().requires_grad_(False)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the images have values")
            if way == "compile":
                torch._dynamo.reset()
                torch.compile(model, backend="eager", fullgraph=True)(*unit)
            elif way == "export":
                torch.export.export(model, unit)
            elif way == "trace":
                torch.jit.trace(model, unit, check_trace=False)
            elif way == "vmap":
                torch.vmap(lambda a, b: model(a[None], b[None]))(*unit)
            elif way == "meta":
                copy.deepcopy(model).to("meta")(*(x.to("meta") for x in unit))
            else:
                with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                    model(*(mode.from_tensor(x) for x in unit))
        with pytest.warns(UserWarning, match="normalize=True"):
            model(*unit)

    def test_compiled_code_does_not_depend_on_it(self, pair: tuple[Tensor, Tensor]) -> None:
        model = model_of().requires_grad_(False)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        compiled(*pair)
        model(*pair)  # notes that it has looked
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled(*pair)


class TestNegativeWeights:
    def step(self, model: lpips_fast.LPIPS, pair: tuple[Tensor, Tensor], by: float) -> None:
        """What an optimiser does, and the next call."""
        with torch.no_grad():
            for lin in model.lins:
                linear_weight(lin).add_(by)
        model(*pair)

    def test_are_noticed_once(self, pair: tuple[Tensor, Tensor]) -> None:
        model = model_of()
        model(*pair)
        with pytest.warns(UserWarning, match=r"negative, the least is -0\.\d+: .*frozen") as caught:
            for _ in range(5):
                self.step(model, pair, -0.1)
        assert len(caught) == 1 and caught[0].filename == __file__

    def test_looks_grow_rare(self, pair: tuple[Tensor, Tensor]) -> None:
        model = model_of()
        model(*pair)
        looks = []
        for k in range(1, 17):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.step(model, pair, -1.0 if k == 9 else 0.0)
            if caught:
                looks.append(k)
        assert looks == [16]  # after 1, 2, 4 and 8

    def test_nothing_is_said_of_weights_that_nobody_teaches(
        self, pair: tuple[Tensor, Tensor], no_warning: None
    ) -> None:
        negative = model_of()
        with torch.no_grad():
            linear_weight(negative.lins[0]).sub_(1)
        for _ in range(3):
            negative(*pair)
        with torch.no_grad():
            model = model_of()
            for _ in range(3):
                self.step(model, pair, -1)


class TestHalfImages:
    @pytest.mark.parametrize("normalize", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("which", ["both", "first", "second"])
    def test_as_lpips_promotes_them(
        self,
        reference: object,
        pair: tuple[Tensor, Tensor],
        unit: tuple[Tensor, Tensor],
        normalize: bool,
        dtype: torch.dtype,
        which: str,
    ) -> None:
        from parity import models, relative

        ours, theirs = models(reference, "alex", "0.1", torch.float32)
        images = list(unit if normalize else pair)
        for k, name in enumerate(("first", "second")):
            if which in ("both", name):
                images[k] = images[k].to(dtype)
        leaves = [x.clone().requires_grad_() for x in images]
        results = [m(*leaves, normalize=normalize) for m in (ours, theirs)]
        assert results[0].dtype == results[1].dtype == torch.float32
        assert relative(*(r.detach() for r in results)) < 1e-5
        mine, other = (torch.autograd.grad(r.sum(), leaves) for r in results)
        for a, b, leaf in zip(mine, other, leaves):
            assert a.dtype == b.dtype == leaf.dtype
            assert relative(a.float(), b.float()) < (1e-4 if leaf.dtype == torch.float32 else 1e-2)

    def test_features_of_them(self, unit: tuple[Tensor, Tensor]) -> None:
        model = model_of()
        halves = [x.half() for x in unit]
        encoded = [model.encode(x, normalize=True) for x in halves]
        assert torch.allclose(model(*encoded), model(*halves, normalize=True), rtol=1e-6)
        assert torch.allclose(
            model.pairwise(halves[0], halves[1], normalize=True).diagonal(),
            model(*halves, normalize=True).flatten(),
            rtol=1e-4,
        )
