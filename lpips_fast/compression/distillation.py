"""A student that learns a metric: its distances, every layer's part, and where they come from.

Where student and teacher have as many layers, each layer's distance is fitted too, which tells the
student what the sum leaves open. Distances are compared by their logarithms, so that small ones,
where training of images ends, count as much as large ones. And where the layers are of the same
heights and widths, so are their maps: how far the features of both images differ at each position.
That is what can be said of features whose channels are others.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..comparison.linear import project_linear_weights
from ..comparison.routes import after_learned_norms
from ..functional import distance_map
from ..lpips import LPIPS
from .triplets import Triplets

__all__ = ["DistillationError", "distill"]

# Added to distances before their logarithm: below, they are no more than rounding and noise.
_FLOOR = 1e-3
# Of the maps' relative squared errors, beside the distances'. Found by trying on AlexNet's half.
_MAPS = 0.1


class DistillationError(Exception):
    """The student's loss is no longer a number."""


def distill(
    student: LPIPS,
    teacher: LPIPS,
    triplets: Triplets,
    *,
    steps: int,
    batch: int = 8,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """Fits a student's trunk and linear weights to a teacher's distances, in place.

    Args:
        student: any LPIPS model with linear weights; a narrow one, or of another trunk.
        teacher: the metric; it is left as it is.
        triplets: to learn from, on the CPU or the student's device.
        steps: of Adam, whose rate falls to 0 along a cosine.
        batch: triplets a step.
        learning_rate: at the beginning.
        seed: of the order.
        progress: show a progress bar.

    Returns:
        The loss of every step.

    Raises:
        ValueError: a student without linear weights.
        DistillationError: the loss is no longer a number.
    """
    if not student.lpips or student.frozen:
        raise ValueError("the student has no linear weights that learn: give one that has")
    frozen = [p for p in student.net.parameters() if not p.requires_grad]
    student.net.requires_grad_(True)
    student.eval()  # without dropout
    learned = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=learning_rate)
    generator, losses = torch.Generator().manual_seed(seed), []
    device = student.scaling_layer.shift.device
    order = torch.empty(0, dtype=torch.long)
    with tqdm(total=steps, unit=" steps", disable=None if progress else True, leave=False) as bar:
        for step in range(steps):
            rate = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.param_groups[0]["lr"] = rate
            if len(order) < batch:
                order = torch.cat((order, torch.randperm(len(triplets), generator=generator)))
            rows, order = order[:batch], order[batch:]
            loss = _loss(student, teacher, triplets[rows], device)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            project_linear_weights(student)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise DistillationError(
                    f"the loss is no longer a number after {step + 1} steps: try a lower learning "
                    f"rate than {learning_rate:g}"
                )
            bar.update()
    for parameter in frozen:
        parameter.requires_grad_(False)
        parameter.grad = None
    return losses


def _loss(student: LPIPS, teacher: LPIPS, triplets: Triplets, device: Any) -> Tensor:
    images = torch.cat((triplets.ref, triplets.p0, triplets.p1)).to(device)
    with torch.no_grad():
        wanted, wanted_maps = _distances(teacher, images)
    found, found_maps = _distances(student, images)
    if len(found) != len(wanted):  # of other layers: the sum alone
        found, wanted = found[:1], wanted[:1]
    loss = ((found + _FLOOR).log() - (wanted + _FLOOR).log()).square().mean()
    if [m.shape for m in found_maps] != [m.shape for m in wanted_maps]:
        return loss
    errors = [
        (f - w).square().mean() / w.square().mean().clamp(min=torch.finfo(w.dtype).tiny)
        for f, w in zip(found_maps, wanted_maps)
    ]
    return loss + _MAPS * torch.stack(errors).mean()


def _distances(model: LPIPS, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(1 + L, 2 N): the distance from each reference to both copies, and each layer's part.

    And of each layer the map (2 N, 1, H_l, W_l) whose mean that part is.
    """
    count = len(images) // 3
    taps = model.encode(images).taps
    references = [torch.cat((tap[:count], tap[:count])) for tap in taps]
    copies = [tap[count:] for tap in taps]
    one, other, normalization = after_learned_norms(model, model.layers, references, copies)
    weights = [model.layer_weight(k) for k in model.layers]
    maps = distance_map(one, other, weights, normalization=normalization)
    layers = torch.stack([of_layer.mean(dim=(1, 2, 3)) for of_layer in maps])
    return torch.cat((layers.sum(dim=0, keepdim=True), layers)), maps
