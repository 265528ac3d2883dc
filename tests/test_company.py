"""Training code that holds a model saves, shards, moves, copies and clamps it as it does lpips."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from parity import image_pair, models, relative, trunk_weights
from torch import Tensor, nn

import lpips_fast
from lpips_fast.comparison.linear import linear_weight

VALUES, GRADIENTS = 1e-5, 1e-4


class Network(nn.Module):
    """A module that is trained and holds its loss."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(3, 3, 3, padding=1)
        self.loss = loss

    def forward(self, image: Tensor) -> Tensor:
        return self.loss(self.body(image).tanh(), image).mean()


def loss_of(net: str = "alex", **options: Any) -> lpips_fast.LPIPS:
    return lpips_fast.LPIPS(net=net, weights=trunk_weights(net), verbose=False, **options)


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    return image_pair(2, 48, 56, torch.float32, seed=0)


def same_as_lpips(
    reference: ModuleType,
    run: Callable[[nn.Module], Tensor],
    tolerance: float = VALUES,
    net: str = "alex",
    **options: Any,
) -> lpips_fast.LPIPS:
    """Holds what ``run`` returns for our model to what it returns for the original; ours."""
    ours, theirs = models(reference, net, "0.1", torch.float32, **options)
    assert relative(run(ours).detach(), run(theirs).detach()) < tolerance
    return ours


def is_fast(model: lpips_fast.LPIPS) -> bool:
    return set(model.fast_path().values()) == {"yes"}


def losses(model: nn.Module, image: Tensor, lr: float = 0.05, steps: int = 3) -> Tensor:
    """Of steps of training, one after the other."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    values = []
    for _ in range(steps):
        value = model(image)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.detach())
    return torch.stack(values)


# ------------------------------------------------------------------------------ files, memory


class TestSaving:
    def test_accelerate(self, tmp_path: Path) -> None:
        accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
        accelerator = accelerate.Accelerator(cpu=True)
        model = accelerator.prepare(Network(loss_of()))
        before = {k: v.clone() for k, v in model.state_dict().items()}
        accelerator.save_state(str(tmp_path))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        accelerator.load_state(str(tmp_path))
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    @pytest.mark.parametrize("frozen", [False, True])
    def test_cpu_offload(self, pair: tuple[Tensor, Tensor], frozen: bool) -> None:
        accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
        expected = loss_of()(*pair)
        model = accelerate.cpu_offload(loss_of(frozen=frozen), execution_device=torch.device("cpu"))
        assert next(model.parameters()).is_meta
        assert relative(model(*pair), expected) < VALUES
        assert relative(model(*pair), expected) < VALUES

    def test_safetensors(self, pair: tuple[Tensor, Tensor], tmp_path: Path) -> None:
        from safetensors.torch import load_model, save_file, save_model

        model, other = loss_of(), loss_of()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9)
        save_model(model, str(tmp_path / "model.safetensors"))
        other(*pair)
        assert load_model(other, str(tmp_path / "model.safetensors"), strict=True) == (set(), [])
        assert torch.equal(other(*pair), model(*pair))
        # As it is, without a copy: parameters are contiguous.
        save_file(dict(model.named_parameters()), str(tmp_path / "parameters.safetensors"))

    @pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle", "torch.save"])
    def test_whole_models(self, pair: tuple[Tensor, Tensor], way: str) -> None:
        model = loss_of()
        expected = model(*pair)
        again: lpips_fast.LPIPS
        if way == "torch.save":
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            again = torch.load(file, weights_only=False)
        elif way == "pickle":
            again = pickle.loads(pickle.dumps(model))
        else:
            again = getattr(copy, way)(model)
        assert torch.equal(again(*pair), expected) and is_fast(again)


# --------------------------------------------------------------------------- other processes


def _train_in_two(rank: int, folder: str, wrapping: str, options: dict[str, Any]) -> None:
    """One of two processes: a rank's part of the batch, the losses of its steps into a file."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        image = image_pair(2, 48, 56, torch.float32, seed=0)[0][rank : rank + 1]
        for name in wrapping.split("+"):
            model: nn.Module = Network(loss_of(**options.get(name, {})))
            mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
            if name == "ddp":
                model = DistributedDataParallel(model)
            elif name == "layers":
                for layer in model.loss.net.modules():
                    if isinstance(layer, nn.Conv2d):
                        fully_shard(layer, mesh=mesh)
                fully_shard(model, mesh=mesh)
            else:
                if name == "frozen":
                    model.train()
                    model.requires_grad_(True)
                fully_shard(model, mesh=mesh)
                if name == "frozen":
                    before = [p.full_tensor().clone() for p in model.loss.parameters()]
            values = losses(model, image)
            dist.all_reduce(values)
            if name == "frozen":
                after = [p.full_tensor() for p in model.loss.parameters()]
                assert all(torch.equal(a, b) for a, b in zip(before, after))
                assert set(model.state_dict()) == {"body.weight", "body.bias"}
            if rank == 0:
                torch.save(values / 2, os.path.join(folder, name))
    finally:
        dist.destroy_process_group()


def test_sharded_and_replicated(tmp_path: Path) -> None:
    """FSDP2 whole, by layer, and of a frozen loss; DDP: as in one process with the whole batch."""
    options = {"layers": {"pnet_tune": True}, "frozen": {"frozen": True}}
    mp.spawn(_train_in_two, (str(tmp_path), "ddp+whole+layers+frozen", options), nprocs=2)
    image = image_pair(2, 48, 56, torch.float32, seed=0)[0]
    for name in ("ddp", "whole", "layers", "frozen"):
        expected = losses(Network(loss_of(**options.get(name, {}))), image)
        found = torch.load(tmp_path / name, weights_only=True)
        assert relative(found, expected) < GRADIENTS, name


def test_marks_of_frameworks_cost_no_speed(pair: tuple[Tensor, Tensor]) -> None:
    model = loss_of()
    for module in model.modules():
        module._is_fsdp_managed_module = True
        module._is_hf_initialized = True
    for k, parameter in enumerate(model.parameters()):
        parameter.ds_id = k
    assert is_fast(model) and torch.equal(model(*pair), loss_of()(*pair))


def test_an_attribute_that_shadows_is_seen(pair: tuple[Tensor, Tensor]) -> None:
    model = loss_of()
    layer = model.net.slice2[1]
    layer.forward = lambda x: nn.Conv2d.forward(layer, x) * 0.5
    assert model.fast_path()["slice2"] == "3 has other attributes than as built: forward"
    assert not torch.allclose(model(*pair), loss_of()(*pair), rtol=1e-3)


def _distance_elsewhere(model: nn.Module, pair: tuple[Tensor, Tensor], queue: Any) -> None:
    torch.set_num_threads(1)
    queue.put(model(*pair).tolist())


def test_spawned_process(pair: tuple[Tensor, Tensor]) -> None:
    model = loss_of().requires_grad_(False).share_memory()
    expected = model(*pair)
    context = mp.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_distance_elsewhere, args=(model, pair, queue))
    process.start()
    found = torch.tensor(queue.get(timeout=240))
    process.join()
    assert torch.equal(found, expected)


def test_replicas(reference: ModuleType, pair: tuple[Tensor, Tensor]) -> None:
    """As torch.nn.parallel.replicate makes them, on the CPU, where it does not run."""

    def run(model: nn.Module) -> Tensor:
        modules = list(model.modules())
        replicas = {m: m._replicate_for_data_parallel() for m in modules}
        for module, replica in replicas.items():
            for key, child in module._modules.items():
                setattr(replica, key, replicas[child])
            for key, parameter in module._parameters.items():
                if parameter is None:
                    replica._parameters[key] = None
                else:
                    setattr(replica, key, parameter.clone())
            for key, buffer in module._buffers.items():
                setattr(replica, key, buffer.clone())
        distance = replicas[model](*pair)
        distance.sum().backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        return torch.cat((distance.flatten(), *grads))

    same_as_lpips(reference, run, GRADIENTS)
    same_as_lpips(reference, run, GRADIENTS, pnet_tune=True)


# ------------------------------------------------------------------------ changes of weights


def weight_norm_everywhere(model: nn.Module) -> None:
    for layer in model.net.modules():
        if isinstance(layer, nn.Conv2d):
            torch.nn.utils.weight_norm(layer)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_old_weight_norm_on_a_trunk_that_learns(reference: ModuleType) -> None:
    image = image_pair(2, 48, 56, torch.float32, seed=0)[0]

    def run(model: nn.Module) -> Tensor:
        weight_norm_everywhere(model)
        values = losses(Network(model), image)
        for layer in model.net.modules():
            if isinstance(layer, nn.Conv2d):
                torch.nn.utils.remove_weight_norm(layer)
        return torch.cat((values, model(image, -image).flatten()))

    same_as_lpips(reference, run, GRADIENTS, pnet_tune=True)


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_clamped_as_by_the_originals_trainer(
    reference: ModuleType, pair: tuple[Tensor, Tensor], net: str
) -> None:
    def run(model: nn.Module) -> Tensor:
        model(*pair)
        with torch.no_grad():
            for lin in model.lins:
                linear_weight(lin).sub_(0.01)
        for module in model.modules():
            if hasattr(module, "weight") and module.kernel_size == (1, 1):
                module.weight.data = torch.clamp(module.weight.data, min=0)
        return model(*pair)

    assert is_fast(same_as_lpips(reference, run, net=net))


def through_a_vector(model: nn.Module) -> None:
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.nn.utils.vector_to_parameters(vector * 0.9, model.parameters())


def assigned(model: nn.Module) -> None:
    state = {k: v * 0.9 if v.dim() != 4 or v.numel() != 3 else v for k, v in _clones(model).items()}
    model.load_state_dict(state, assign=True)


def swapped(model: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double().float()
        model.load_state_dict(_clones(model))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def overwritten(model: nn.Module) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def another_parameter(model: nn.Module) -> None:
    layer = model.net.slice2[1]
    layer.weight = nn.Parameter(layer.weight.detach() * 0.8)


def other_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.9


def many_written_at_once(model: nn.Module) -> None:
    torch._foreach_mul_([p.data for p in model.parameters()], 0.9)


def written_through_numpy(model: nn.Module) -> None:
    model.net.slice2[1].weight.detach().numpy()[...] *= 0.9


def written_into_the_state_dict(model: nn.Module) -> None:
    for value in model.state_dict().values():
        value.copy_(value * 0.9 if value.numel() != 3 else value)


def learned_by_lbfgs(model: nn.Module) -> None:
    image = image_pair(2, 48, 56, torch.float32, seed=0)[0]
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2, lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(image, -image).sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def applied(model: nn.Module) -> None:
    torch.manual_seed(0)
    model.net.apply(
        lambda m: nn.init.normal_(m.weight, 0, 0.05) if isinstance(m, nn.Conv2d) else None
    )


def _clones(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize(
    "change",
    [
        through_a_vector,
        assigned,
        swapped,
        overwritten,
        another_parameter,
        other_data,
        many_written_at_once,
        written_through_numpy,
        written_into_the_state_dict,
        learned_by_lbfgs,
        applied,
    ],
)
def test_weights_written_after_a_call(
    reference: ModuleType, pair: tuple[Tensor, Tensor], change: Callable[[nn.Module], None]
) -> None:
    def run(model: nn.Module) -> Tensor:
        model.requires_grad_(change is learned_by_lbfgs)
        model(*pair)
        change(model)
        return model.requires_grad_(False)(*pair)

    tolerance = GRADIENTS if change is learned_by_lbfgs else VALUES
    assert is_fast(same_as_lpips(reference, run, tolerance))


# -------------------------------------------------------------------- wrapped and converted


class LowRank(nn.Module):
    """A layer with a learned addition of low rank, as adapters are."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base_layer = layer
        size, stride, padding = layer.kernel_size, layer.stride, layer.padding
        self.down = nn.Conv2d(layer.in_channels, 4, size, stride, padding, bias=False)
        self.up = nn.Conv2d(4, layer.out_channels, 1, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def adapters_in_the_trunk(model: nn.Module) -> None:
    for block in model.net.children():
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Conv2d):
                block._modules[name] = LowRank(layer)


def adapters_on_linear_layers(model: nn.Module) -> None:
    for lin in model.lins:
        lin.model[1] = LowRank(lin.model[1])


def parametrizations(model: nn.Module) -> None:
    torch.manual_seed(0)
    torch.nn.utils.parametrizations.orthogonal(model.net.slice3[1])
    torch.nn.utils.parametrizations.weight_norm(model.net.slice2[1])
    torch.nn.utils.parametrizations.spectral_norm(model.net.slice4[0]).eval()


def quantization_observers(model: nn.Module) -> nn.Module:
    model.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    return torch.ao.quantization.prepare(model)


def other_activations(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.ELU())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("change", "net"),
    [
        (adapters_in_the_trunk, "alex"),
        (adapters_on_linear_layers, "alex"),
        (parametrizations, "alex"),
        (quantization_observers, "alex"),
        (other_activations, "squeeze"),
    ],
)
def test_wrapped_layers(
    reference: ModuleType,
    pair: tuple[Tensor, Tensor],
    change: Callable[[nn.Module], nn.Module | None],
    net: str,
) -> None:
    def run(model: nn.Module) -> Tensor:
        model = change(model) or model
        image = pair[0].clone().requires_grad_()
        distance = model(image, pair[1])
        (grad,) = torch.autograd.grad(distance.sum(), image)
        return torch.cat((distance.flatten(), grad.flatten()))

    same_as_lpips(reference, run, GRADIENTS, net=net)


@pytest.mark.parametrize(
    ("convert", "dtype", "tolerance"),
    [
        (lambda m: m.half(), torch.float16, 2e-2),
        (lambda m: m.bfloat16(), torch.bfloat16, 5e-2),
        (lambda m: m.double(), torch.float64, 1e-10),
        (lambda m: m.double().float(), torch.float32, VALUES),
        (lambda m: m.to(memory_format=torch.channels_last), torch.float32, VALUES),
        (lambda m: m.share_memory(), torch.float32, VALUES),
    ],
    ids=["half", "bfloat16", "double", "and back", "channels_last", "share_memory"],
)
def test_conversions(
    reference: ModuleType,
    pair: tuple[Tensor, Tensor],
    convert: Callable[[nn.Module], nn.Module],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    images = [image.to(dtype) for image in pair]

    def run(model: nn.Module) -> Tensor:
        return convert(model)(*images)

    ours = same_as_lpips(reference, run, tolerance)
    if dtype == torch.float32:
        assert is_fast(ours)


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_names_in_the_same_order(reference: ModuleType, net: str) -> None:
    ours = lpips_fast.LPIPS(net=net, pnet_rand=True, verbose=False)
    theirs = reference.LPIPS(net=net, pnet_rand=True, verbose=False)
    for what in ("named_parameters", "named_modules", "named_buffers"):
        names = [[name for name, _ in getattr(model, what)()] for model in (ours, theirs)]
        assert names[0] == names[1]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [p.requires_grad for p in ours.parameters()] == [
        p.requires_grad for p in theirs.parameters()
    ]
    assert all(p.is_contiguous() for p in ours.parameters())
