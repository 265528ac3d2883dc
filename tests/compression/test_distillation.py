"""A student comes nearer to its teacher, and its settings are left as they were."""

from __future__ import annotations

import pytest
import torch
from many_images import model_of, some_images

from lpips_fast import LPIPS
from lpips_fast.compression import (
    DistillationError,
    agreement,
    distill,
    distorted_triplets,
    prune,
)
from lpips_fast.compression.distillation import _distances
from lpips_fast.export.portable import PortableLPIPS


@pytest.fixture(scope="module")
def teacher() -> LPIPS:
    return LPIPS(net="alex", verbose=False)


def test_a_narrow_student(teacher: LPIPS) -> None:
    triplets = distorted_triplets(list(some_images(4, (80, 70))), 40, 8)
    student = prune(teacher, triplets, 0.5)
    before = agreement(student, teacher, triplets)
    # All at every step, so that chance has no part in it.
    losses = distill(student, teacher, triplets, steps=25, batch=8, learning_rate=3e-4)
    after = agreement(student, teacher, triplets)
    assert len(losses) == 25 and losses[-1] < 0.6 * losses[0]
    assert after.error < before.error
    assert not any(p.requires_grad for p in student.net.parameters())
    assert not student.training and set(student.fast_path().values()) == {"yes"}
    assert all((student.layer_weight(k) >= 0).all() for k in range(student.L))
    pair = triplets.ref[:2], triplets.p1[:2]
    with torch.no_grad():
        torch.testing.assert_close(PortableLPIPS(student)(*pair), student(*pair).flatten())


@pytest.mark.parametrize("normalization", ["l2", "l1", "learned"])
def test_what_is_fitted_is_the_metric(normalization) -> None:
    """The whole, every layer's part, and the maps whose means these are."""
    model = LPIPS(verbose=False, normalization=normalization)
    if normalization == "learned":
        with torch.no_grad():
            for norm in model.norms:
                norm.shift.add_(0.1)
    images = distorted_triplets(list(some_images(3, (60, 50))), 40, 4)
    together = torch.cat((images.ref, images.p0, images.p1))
    found, maps = _distances(model, together)
    for first, copies in ((0, images.p0), (4, images.p1)):
        value, layers = model(images.ref, copies, retPerLayer=True)
        expected = torch.stack([value.flatten(), *(layer.flatten() for layer in layers)])
        torch.testing.assert_close(found[:, first : first + 4], expected)
    for layer, of_layer in zip(found[1:], maps):
        torch.testing.assert_close(of_layer.mean(dim=(1, 2, 3)), layer)


def test_a_student_of_another_trunk(teacher: LPIPS) -> None:
    triplets = distorted_triplets(list(some_images(3, (50, 50))), 40, 4)
    student = model_of("squeeze")
    losses = distill(student, teacher, triplets, steps=12, batch=4, learning_rate=3e-4)
    assert losses[-1] < losses[0]


def test_what_cannot_be(teacher: LPIPS) -> None:
    triplets = distorted_triplets([torch.rand(3, 40, 40)], 40, 4)
    for options in ({"lpips": False}, {"frozen": True}):
        with pytest.raises(ValueError, match="no linear weights that learn"):
            distill(LPIPS(verbose=False, **options), teacher, triplets, steps=1)
    with pytest.raises(DistillationError, match="try a lower learning rate than"):
        distill(LPIPS(verbose=False), teacher, triplets, steps=30, batch=4, learning_rate=1e18)


def test_triplets() -> None:
    images = [torch.rand(3, 60, 90) * 2 - 1, torch.rand(3, 30, 30) * 2 - 1]
    triplets = distorted_triplets(images, 48, 20, seed=3)
    same = distorted_triplets(images, 48, 20, seed=3)
    other = distorted_triplets(images, 48, 20, seed=4)
    for name in ("ref", "p0", "p1"):
        x = getattr(triplets, name)
        assert x.shape == (20, 3, 48, 48) and x.abs().max() <= 1
        assert torch.equal(x, getattr(same, name)) and not torch.equal(x, getattr(other, name))
    assert len(triplets[4:7]) == 3
    for p in (triplets.p0, triplets.p1):
        assert (p != triplets.ref).flatten(1).any(dim=1).sum() >= 18
    for arguments in (([], 48, 5), (images, 0, 5), (images, 48, 0)):
        with pytest.raises(ValueError, match="expected images, and a size and a count from 1"):
            distorted_triplets(*arguments)
