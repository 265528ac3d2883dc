"""What a user's type checker must say of a script: it is read, not run.

Each ``type: ignore`` names the error that must be there: ``--strict`` refuses one too many.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

import lpips_fast
import lpips_fast as lpips
from lpips_fast import LPIPS, Features, functional, recommend_trunk
from lpips_fast.choice import Recommendation

a, b = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
model = LPIPS(net="alex", spatial=False, reduction="mean", verbose=False)

assert_type(model(a, b), Tensor)
assert_type(model(a, b, False), Tensor)
assert_type(model(a, b, normalize=True), Tensor)
assert_type(model(a, b, True), tuple[Tensor, list[Tensor]])
assert_type(model(a, b, retPerLayer=True, normalize=True), tuple[Tensor, list[Tensor]])
assert_type(model.forward(a, b), Tensor)


def either(per_layer: bool) -> Tensor | tuple[Tensor, list[Tensor]]:
    return model(a, b, per_layer)


features = model.encode(b)
assert_type(features, Features)
assert_type(model(a, features), Tensor)
assert_type(model.distance(features, features), Tensor)
assert_type(model.distance(features, features, True), tuple[Tensor, list[Tensor]])
assert_type(model.layers, tuple[int, ...])
assert_type(model.layer_weight(0), Tensor)
assert_type(model.fast_path(), dict[str, str])
assert_type(model.pairwise(a, b), Tensor)
assert_type(model.nearest(a, b, k=1), tuple[Tensor, Tensor])
assert_type(model.to("cpu"), LPIPS)
assert_type(functional.distance([a], [b], [torch.ones(3)]), Tensor)

found = recommend_trunk(min_2afc=0.69, image_size=(64, 64))
assert_type(found, Recommendation)
assert_type(lpips_fast.__version__, str)
assert_type(lpips.LPIPS(net="vgg16", version="0.0", weights="folder"), LPIPS)

LPIPS(net="resnet")  # type: ignore[arg-type]
LPIPS(version="0.2")  # type: ignore[arg-type]
LPIPS(reduction="average")  # type: ignore[arg-type]
LPIPS(normalization="l3")  # type: ignore[arg-type]
LPIPS(nets="alex")  # type: ignore[call-arg]
LPIPS(True, "alex", "0.1", True, False, False, False, True, None, True, True, "w")  # type: ignore[call-arg]
model(a)  # type: ignore[call-overload]
model("a.png", b)  # type: ignore[call-overload]
model(a, b, True).mean()  # type: ignore[attr-defined]
recommend_trunk(mode="backward")  # type: ignore[arg-type]
