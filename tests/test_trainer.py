"""The original's names and its trainer, call by call: the same steps, losses, files and scores."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from parity import image_pair, models, relative, trunk_weights
from torch import Tensor, nn

import lpips_fast
from lpips_fast.comparison.linear import linear_weight


def batches(count: int = 4, size: int = 3) -> list[dict[str, Tensor]]:
    """Triplets as the original's loaders give them."""
    generator = torch.Generator().manual_seed(5)
    result = []
    for k in range(count):
        ref, p0 = image_pair(size, 48, 48, torch.float32, seed=k)
        p1 = (ref + 0.4 * torch.randn(ref.shape, generator=generator)).clamp(-1, 1)
        votes = torch.randint(6, (size, 1, 1, 1), generator=generator) / 5
        result.append({"ref": ref, "p0": p0, "p1": p1, "judge": votes, "same": votes})
    return result


class Loader:
    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def load_data(self) -> list[dict[str, Tensor]]:
        return self.batches


def trainer_of(package: Any, net: str = "alex", **options: Any) -> Any:
    trainer = package.Trainer()
    trainer.initialize(net=net, use_gpu=False, pnet_rand=True, **options)
    return trainer


def pair_of_trainers(reference: ModuleType, net: str, **options: Any) -> tuple[Any, Any]:
    """Ours and the original's, from the same weights and without dropout."""
    ours, theirs = (trainer_of(p, net, is_train=True, **options) for p in (lpips_fast, reference))
    ours.net.net.load_features(trunk_weights(net))
    with torch.no_grad():
        for lin in ours.net.lins:
            linear_weight(lin).abs_()
    theirs.net.load_state_dict(ours.net.state_dict())
    theirs.rankLoss.load_state_dict(ours.rankLoss.state_dict())
    for trainer in (ours, theirs):
        for module in trainer.net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return ours, theirs


class TestTraining:
    @pytest.mark.parametrize(("net", "tune"), [("alex", False), ("alex", True)])
    def test_step_by_step(self, reference: ModuleType, net: str, tune: bool) -> None:
        ours, theirs = pair_of_trainers(reference, net, pnet_tune=tune, lr=1e-3)
        for batch in batches():
            for trainer in (ours, theirs):
                trainer.set_input(copy.deepcopy(batch))
                trainer.optimize_parameters()
            mine, other = ours.get_current_errors(), theirs.get_current_errors()
            assert list(mine) == list(other) == ["loss_total", "acc_r"]
            assert mine["loss_total"] == pytest.approx(other["loss_total"], rel=1e-4)
            assert mine["acc_r"] == pytest.approx(other["acc_r"])
        for trainer in (ours, theirs):
            trainer.update_learning_rate(5)
        assert ours.old_lr == theirs.old_lr == ours.optimizer_net.param_groups[0]["lr"]
        state = theirs.net.state_dict()
        for key, value in ours.net.state_dict().items():
            # Adam's first steps are of one size whatever the gradient, so that noise in those that
            # are nearly zero is seen.
            assert relative(value, state[key]) < 2e-2, key

    def test_the_trunk_of_squeezenet_is_left_alone(self) -> None:
        trainer = trainer_of(lpips_fast, "squeeze", is_train=True)
        before = copy.deepcopy(trainer.net.net.state_dict())
        trainer.set_input(batches(1)[0])
        trainer.optimize_parameters()
        assert all(torch.equal(before[k], v) for k, v in trainer.net.net.state_dict().items())
        assert all(linear_weight(lin).min() >= 0 for lin in trainer.net.lins)

    def test_linear_weights_begin_random_and_drop_out(self) -> None:
        trainer = trainer_of(lpips_fast, is_train=True)
        published = lpips_fast.weights.load_lin_weights("alex", "0.1")
        assert not torch.equal(linear_weight(trainer.net.lins[0]), published["lin0.model.1.weight"])
        assert trainer.net.training and trainer.name() == "lpips [alex]"

    def test_visuals(self) -> None:
        trainer = trainer_of(lpips_fast, is_train=True)
        trainer.set_input(batches(1)[0])
        visuals = trainer.get_current_visuals()
        assert list(visuals) == ["ref", "p0", "p1"]
        for name, image in visuals.items():
            assert image.shape == (256, 256, 3) and image.dtype == np.uint8
            first = lpips_fast.tensor2im(trainer.input_ref if name == "ref" else trainer.var_ref)
            if name == "ref":
                assert np.array_equal(image[0, 0], first[0, 0])
                assert np.array_equal(image[-1, -1], first[-1, -1])

    def test_saved_files_load_in_the_original(self, reference: ModuleType, tmp_path: Path) -> None:
        trainer = trainer_of(lpips_fast, is_train=True)
        trainer.save(str(tmp_path), "latest")
        assert {p.name for p in tmp_path.iterdir()} == {"latest_net_.pth", "latest_net_rank.pth"}
        theirs = trainer_of(reference, is_train=True)
        theirs.save_dir = trainer.save_dir = str(tmp_path)
        theirs.load_network(theirs.net, "", "latest")
        trainer.load_network(trainer.rankLoss.net, "rank", "latest")
        tested = trainer_of(lpips_fast, model_path=str(tmp_path / "latest_net_.pth"))
        x, y = image_pair(2, 48, 48, torch.float32, seed=0)
        theirs.net.eval()
        assert not tested.net.training
        assert relative(tested.forward(x, y), theirs.forward(x, y)) < 1e-5


class TestModels:
    @pytest.mark.parametrize("model", ["lpips", "baseline"])
    def test_scores_of_a_model(self, reference: ModuleType, model: str) -> None:
        found = []
        for package in (lpips_fast, reference):
            trainer = trainer_of(package, model=model)
            trainer.net.load_state_dict(
                models(reference, "alex", "0.1", torch.float32, lpips=model == "lpips")[
                    1
                ].state_dict()
            )
            score, parts = package.score_2afc_dataset(Loader(batches()), trainer.forward, name="x")
            # The original's score of JND takes flat distances.
            average, _ = package.score_jnd_dataset(
                Loader(batches()), lambda a, b, t=trainer: t.forward(a, b).flatten()
            )
            found.append((score, average, parts))
        (score, average, parts), (other_score, other_average, others) = found
        assert (score, average) == pytest.approx((other_score, other_average))
        for name in ("d0s", "d1s", "gts", "scores"):
            np.testing.assert_allclose(parts[name], others[name], rtol=1e-4)

    def test_distances_without_a_network(self) -> None:
        pytest.importorskip("skimage")
        x, y = image_pair(1, 48, 48, torch.float32, seed=0)
        for name, kind in (("l2", "L2"), ("ssim", "SSIM")):
            trainer = trainer_of(lpips_fast, model=name, colorspace="RGB")
            assert trainer.name() == kind and trainer.forward(x, y).shape == (1,)

    def test_print_net(self, capsys: pytest.CaptureFixture[str]) -> None:
        trainer_of(lpips_fast, printNet=True)
        assert "Total number of parameters" in capsys.readouterr().out

    def test_unknown_model(self) -> None:
        with pytest.raises(
            ValueError, match=r"unknown model 'net-lin'; expected one of lpips, base"
        ):
            trainer_of(lpips_fast, model="net-lin")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_no_gpu(self) -> None:
        with pytest.raises(RuntimeError, match="torch sees no CUDA device; pass use_gpu=False"):
            lpips_fast.Trainer().initialize()


class TestNames:
    def test_of_the_package(self, reference: ModuleType) -> None:
        imported = {"absolute_import", "division", "print_function", "np", "nn", "init", "torch"}
        imported |= {"os", "tqdm", "zoom", "Variable", "OrderedDict"}
        public = {name for name in vars(reference) if not name.startswith("_")} - imported
        assert not {name for name in public if not hasattr(lpips_fast, name)}

    def test_of_the_submodules(self, reference: ModuleType) -> None:
        import lpips.lpips  # noqa: F401

        for name in ("lpips", "trainer", "pretrained_networks"):
            import sys

            theirs, ours = sys.modules[f"lpips.{name}"], getattr(lpips_fast, name)
            made_there = {
                key
                for key, value in vars(theirs).items()
                if getattr(value, "__module__", None) == theirs.__name__
            }
            assert made_there and not {key for key in made_there if not hasattr(ours, key)}
        assert lpips_fast.pn is lpips_fast.lpips.pn is lpips_fast.pretrained_networks

    @pytest.mark.parametrize(
        ("name", "net"), [("alexnet", "alex"), ("vgg16", "vgg"), ("squeezenet", "squeeze")]
    )
    def test_trunks(self, reference: ModuleType, name: str, net: str) -> None:
        ours = getattr(lpips_fast.pn, name)(pretrained=False)
        theirs = getattr(reference.pn, name)(pretrained=False)
        ours.load_features(trunk_weights(net))
        theirs.load_state_dict(ours.state_dict(), strict=True)
        x = image_pair(2, 48, 56, torch.float32, seed=0)[0]
        found, expected = ours(x), theirs(x)
        assert found._fields == expected._fields and ours.N_slices == theirs.N_slices
        assert all(relative(a, b) < 1e-5 for a, b in zip(found, expected))
        assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
        assert not any(p.requires_grad for p in ours.parameters())
        learning = getattr(lpips_fast.pn, name)(True, False)
        assert all(p.requires_grad for p in learning.parameters())
        assert all(torch.equal(a, b) for a, b in zip(copy.deepcopy(ours)(x), found))

    def test_pretrained_trunk(self) -> None:
        alexnet = lpips_fast.pn.alexnet()
        expected = lpips_fast.LPIPS(verbose=False).net.state_dict()
        assert all(torch.equal(expected[k], v) for k, v in alexnet.state_dict().items())

    def test_a_trunk_put_into_a_model(self, reference: ModuleType) -> None:
        ours, theirs = models(reference, "alex", "0.1", torch.float32)
        ours.net, theirs.net = lpips_fast.pn.alexnet(), reference.pn.alexnet(pretrained=False)
        theirs.net.load_state_dict(ours.net.state_dict())
        x, y = image_pair(2, 48, 56, torch.float32, seed=0)
        assert relative(ours(x, y), theirs(x, y)) < 1e-5

    def test_resnet(self, reference: ModuleType) -> None:
        ours = lpips_fast.pn.resnet(pretrained=False).eval()
        theirs = reference.pn.resnet(pretrained=False).eval()
        theirs.load_state_dict(ours.state_dict(), strict=True)
        x = image_pair(1, 48, 56, torch.float32, seed=0)[0]
        found, expected = ours(x), theirs(x)
        assert found._fields == expected._fields
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
        with pytest.raises(ValueError, match="no ResNet of 20 layers; expected one of 18, 34"):
            lpips_fast.pn.resnet(num=20)
