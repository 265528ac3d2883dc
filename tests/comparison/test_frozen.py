"""A frozen loss inside a trained module keeps its bits; checkpoints neither hold nor miss it."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from parity import image_pair, trunk_weights
from torch import Tensor, nn

import lpips_fast
from lpips_fast.comparison.linear import linear_weight

LR, STEPS = 1e-2, 40


class Parent(nn.Module):
    """A module that is trained and holds its loss, as people write it."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3, 3, padding=1)
        self.loss = loss

    def forward(self, image: Tensor) -> Tensor:
        return self.loss(self.body(image).tanh(), image).mean()


def loss_of(net: str = "alex", **options: object) -> lpips_fast.LPIPS:
    return lpips_fast.LPIPS(net=net, weights=trunk_weights(net), verbose=False, **options)


@pytest.fixture
def parent() -> Parent:
    return Parent(loss_of(frozen=True))


@pytest.fixture(scope="module")
def image() -> Tensor:
    return image_pair(2, 48, 48, torch.float32, seed=3)[0]


def train(parent: Parent, image: Tensor, steps: int = STEPS) -> None:
    """Everything that teaches a loss to be small."""
    parent.train()
    parent.requires_grad_(True)
    optimizer = torch.optim.AdamW(parent.parameters(), lr=LR, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        parent(image).backward()
        optimizer.step()


def hook_on_a_layer(loss: nn.Module) -> None:
    loss.net.slice2[1].register_forward_hook(lambda module, args, output: output * 0.5)


def hook_on_the_trunk(loss: nn.Module) -> None:
    loss.net.register_forward_hook(lambda module, args, output: None)


def hook_on_a_linear_layer(loss: nn.Module) -> None:
    loss.lins[1].register_forward_hook(lambda module, args, output: output)


def parametrized_layer(loss: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(loss.net.slice2[1])


def layers_switched_to_training(loss: nn.Module) -> None:
    for module in loss.modules():
        if module is not loss:
            module.train()


class TestItLearnsNothing:
    @pytest.mark.parametrize(
        ("change", "steps"),
        [
            (None, STEPS),
            (hook_on_a_layer, 3),
            (hook_on_the_trunk, 3),
            (hook_on_a_linear_layer, 3),
            (parametrized_layer, 3),
            (layers_switched_to_training, 3),
        ],
    )
    @pytest.mark.parametrize("checkpoint", [False, True])
    def test_same_bits_after_training(
        self,
        image: Tensor,
        change: Callable[[nn.Module], None] | None,
        steps: int,
        checkpoint: bool,
    ) -> None:
        if checkpoint and steps == STEPS:
            steps = 3
        parent = Parent(loss_of(frozen=True, checkpoint=checkpoint))
        if change is not None:
            change(parent.loss)
        before = {k: v.clone() for k, v in parent.loss.state_dict().items()}
        body = parent.body.weight.detach().clone()
        train(parent, image, steps)
        assert all(torch.equal(before[k], v) for k, v in parent.loss.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in parent.loss.parameters())
        assert not torch.equal(parent.body.weight, body)

    def test_without_frozen_it_walks_away_and_says_so_once(self, image: Tensor) -> None:
        parent = Parent(loss_of())
        with pytest.warns(UserWarning, match="have learned to be negative") as caught:
            train(parent, image)
        assert len([w for w in caught if "negative" in str(w.message)]) == 1
        assert caught[0].filename == __file__
        assert min(linear_weight(lin).min().item() for lin in parent.loss.lins) < 0

    def test_weights_that_are_clamped_are_nothing_to_warn_of(self, image: Tensor) -> None:
        parent = Parent(loss_of())
        optimizer = torch.optim.SGD(parent.parameters(), lr=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(9):
                optimizer.zero_grad()
                parent(image).backward()
                optimizer.step()
                for lin in parent.loss.lins:
                    lin.model[-1].weight.data.clamp_(min=0)

    def test_parameters_stay_parameters(self) -> None:
        frozen, usual = loss_of(frozen=True), loss_of()
        assert [n for n, _ in frozen.named_parameters()] == [n for n, _ in usual.named_parameters()]
        assert next(frozen.to(torch.float64).parameters()).dtype == torch.float64
        assert not any(p.requires_grad for p in frozen.parameters())

    def test_gradients_of_images_are_the_same(self, image: Tensor) -> None:
        grads = []
        for loss in (loss_of(frozen=True).requires_grad_(True), loss_of()):
            x = image.clone().requires_grad_()
            grads.append(torch.autograd.grad(loss(x, -image).sum(), x)[0])
        assert torch.equal(*grads)

    def test_the_fast_path_is_taken_whatever_is_asked_of_the_weights(self, parent: Parent) -> None:
        parent.train()
        parent.requires_grad_(True)
        assert set(parent.loss.fast_path().values()) == {"yes"}

    def test_under_compile(self, parent: Parent, image: Tensor) -> None:
        parent.requires_grad_(True)
        torch._dynamo.reset()
        torch.compile(parent, backend="aot_eager")(image).backward()
        assert all(p.grad is None for p in parent.loss.parameters())
        assert parent.body.weight.grad is not None

    def test_with_a_trunk_that_is_to_learn(self) -> None:
        with pytest.raises(ValueError, match="frozen=True keeps all weights, but pnet_tune=True"):
            lpips_fast.LPIPS(pnet_rand=True, pnet_tune=True, frozen=True, verbose=False)


class TestDropout:
    def test_training_mode_of_the_parent(self, parent: Parent, image: Tensor) -> None:
        expected = parent.loss(image, -image)
        parent.train()
        assert parent.training and not any(m.training for m in parent.loss.modules())
        assert torch.equal(parent.loss(image, -image), expected)

    def test_training_mode_of_each_module(self, parent: Parent, image: Tensor) -> None:
        expected = parent.loss(image, -image)
        layers_switched_to_training(parent.loss)
        assert torch.equal(parent.loss(image, -image), expected)
        assert set(parent.loss.fast_path().values()) == {"yes"}

    def test_eval_mode_false(self) -> None:
        assert not loss_of(frozen=True, eval_mode=False).training


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class TestCheckpoints:
    def test_the_parents_holds_nothing_of_it(self, parent: Parent, no_warning: None) -> None:
        assert list(parent.state_dict()) == ["body.weight", "body.bias"]
        parent.load_state_dict(parent.state_dict(), strict=True)
        parent.load_state_dict(parent.state_dict(), strict=True, assign=True)

    def test_deeper_and_wrapped(self, parent: Parent) -> None:
        outer = nn.ModuleDict({"a": parent, "b": nn.DataParallel(loss_of(frozen=True))})
        assert list(outer.state_dict()) == ["a.body.weight", "a.body.bias"]
        outer.load_state_dict(outer.state_dict())

    def test_an_older_one_with_the_same_weights(self, parent: Parent, no_warning: None) -> None:
        old = Parent(loss_of())
        parent.load_state_dict(old.state_dict(), strict=True)
        assert torch.equal(parent.body.weight, old.body.weight)

    @pytest.mark.parametrize("net", ["alex", "squeeze"])
    def test_an_older_one_with_other_weights(self, net: str) -> None:
        parent, old = Parent(loss_of(frozen=True)), Parent(loss_of(net))
        before = copy.deepcopy(parent.loss.state_dict())
        with torch.no_grad():
            linear_weight(old.loss.lins[1]).mul_(2)
        with pytest.warns(
            UserWarning, match=r"other weights than the frozen loss 'loss' has, first"
        ):
            parent.load_state_dict(old.state_dict(), strict=True)
        assert torch.equal(parent.body.weight, old.body.weight)
        assert all(torch.equal(before[k], v) for k, v in parent.loss.state_dict().items())

    def test_without_dropout(self, parent: Parent, no_warning: None) -> None:
        parent.load_state_dict(Parent(loss_of(use_dropout=False)).state_dict(), strict=True)

    def test_what_others_miss_is_missed(self, parent: Parent) -> None:
        two = nn.ModuleList([loss_of(), parent, nn.Linear(1, 1)])
        state = {k: v for k, v in two.state_dict().items() if "lin0" not in k and "bias" not in k}
        missing, unexpected = two.load_state_dict({**state, "1.loss.what": 0}, strict=False)
        assert unexpected == ["1.loss.what"]
        assert "1.body.bias" in missing and "2.bias" in missing and "0.net.slice1.0.bias" in missing
        assert not any(key.startswith("1.loss") for key in missing)

    def test_its_own_is_whole(self, parent: Parent) -> None:
        usual = loss_of()
        assert list(parent.loss.state_dict()) == list(usual.state_dict())
        with torch.no_grad():
            linear_weight(usual.lins[0]).mul_(2)
        parent.loss.load_state_dict(usual.state_dict(), strict=True)
        assert torch.equal(linear_weight(parent.loss.lins[0]), linear_weight(usual.lins[0]))

    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
    def test_copies(self, parent: Parent, image: Tensor, way: str) -> None:
        if way == "deepcopy":
            again = copy.deepcopy(parent)
        elif way == "pickle":
            again = pickle.loads(pickle.dumps(parent))
        else:
            file = io.BytesIO()
            torch.save(parent, file)
            file.seek(0)
            again = torch.load(file, weights_only=False)
        assert torch.equal(again(image), parent(image))
        assert list(again.state_dict()) == ["body.weight", "body.bias"]
        again.load_state_dict(parent.state_dict(), strict=True)
        train(again, image, steps=2)
        assert all(
            torch.equal(a, b) for a, b in zip(again.loss.parameters(), parent.loss.parameters())
        )

    def test_safetensors(self, parent: Parent, tmp_path: Path) -> None:
        from safetensors.torch import load_file, load_model, save_model

        save_model(parent, str(tmp_path / "new.safetensors"))
        assert set(load_file(tmp_path / "new.safetensors")) == {"body.weight", "body.bias"}
        assert load_model(parent, str(tmp_path / "new.safetensors"), strict=True) == (set(), [])
        save_model(Parent(loss_of()), str(tmp_path / "old.safetensors"))
        assert load_model(parent, str(tmp_path / "old.safetensors"), strict=True) == (set(), [])

    def test_distributed_checkpoint(self, parent: Parent, tmp_path: Path) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import (
            get_model_state_dict,
            set_model_state_dict,
        )

        for name, held in (("new", parent), ("old", Parent(loss_of()))):
            state = {"model": get_model_state_dict(held)}
            dcp.save(state, checkpoint_id=tmp_path / name, no_dist=True)
        for name in ("new", "old"):
            state = {"model": get_model_state_dict(parent)}
            assert set(state["model"]) == {"body.weight", "body.bias"}
            dcp.load(state, checkpoint_id=tmp_path / name, no_dist=True)
            set_model_state_dict(parent, state["model"])

    def test_average_of_weights(self, parent: Parent, image: Tensor) -> None:
        average = torch.optim.swa_utils.AveragedModel(parent)
        average.update_parameters(parent)
        average.update_parameters(parent)
        assert set(average.state_dict()) == {"n_averaged", "module.body.weight", "module.body.bias"}
        assert torch.allclose(average(image), parent(image))
