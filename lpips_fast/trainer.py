"""``lpips.Trainer`` and the scores, for scripts written for the original's ``trainer`` submodule.

The original's ``train.py`` and ``test_dataset_model.py`` run on this. New code has
:mod:`lpips_fast.judgements`: a run that can be resumed and repeated to the bit, validation sets, a
log, and a frozen trunk that runs once an image instead of once an epoch.

Where :class:`Trainer` departs from the original's:

- Only linear weights are projected onto w >= 0. The original clamps every 1x1 convolution, and so
  destroys SqueezeNet's trunk.
- The reference goes through the trunk once a triplet, not twice, and images get no gradient, which
  nothing used.
- The accuracy is computed when it is asked for: on GPUs reading it stalls a step.
- ``printNet=True`` works.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .comparison.linear import project_linear_weights
from .compat import DSSIM, L2, BCERankingLoss, print_network, tensor2im
from .features import Features
from .judgements.scoring import score_2afc_dataset, score_jnd_dataset
from .lpips import LPIPS
from .weights import read_state_dict

__all__ = ["Trainer", "score_2afc_dataset", "score_jnd_dataset"]

#: Height and width of :meth:`Trainer.get_current_visuals`.
_VISUAL_SIZE = 256


class Trainer:
    """The original's trainer, call by call.

    trainer = Trainer()
    trainer.initialize(model="lpips", net="alex", use_gpu=False, is_train=True)
    for batch in loader:
        trainer.set_input(batch)
        trainer.optimize_parameters()
    trainer.save("checkpoints", "latest")

    Attributes:
        net: the model: :class:`LPIPS`, :class:`L2` or :class:`DSSIM`; with ``use_gpu`` inside
            ``torch.nn.DataParallel``.
        parameters: what is learned, a list.
        rankLoss: :class:`BCERankingLoss`, in training.
        optimizer_net: Adam, in training.
        d0, d1, loss_total: of the last batch.
    """

    save_dir: str
    image_paths: Any

    def name(self) -> str:
        """What is trained, for example ``'lpips [alex]'``."""
        return self.model_name

    def initialize(
        self,
        model: str = "lpips",
        net: str = "alex",
        colorspace: str = "Lab",
        pnet_rand: bool = False,
        pnet_tune: bool = False,
        model_path: str | os.PathLike[str] | None = None,
        use_gpu: bool = True,
        printNet: bool = False,
        spatial: bool = False,
        is_train: bool = False,
        lr: float = 0.0001,
        beta1: float = 0.5,
        version: str = "0.1",
        gpu_ids: Sequence[int] = (0,),
    ) -> None:
        """Makes the model, and in training its ranking loss and optimiser.

        Args:
            model: ``'lpips'``; ``'baseline'`` without linear weights; ``'l2'`` or ``'ssim'``.
            net, pnet_rand, pnet_tune, model_path, spatial, version: as for :class:`LPIPS`. In
                training linear weights begin random.
            colorspace: ``'Lab'`` or ``'RGB'``, for ``'l2'`` and ``'ssim'``.
            use_gpu: move the model to ``gpu_ids`` and share batches among them.
            printNet: print the model.
            is_train: learn; otherwise the model is in evaluation mode.
            lr, beta1: of Adam.
            gpu_ids: devices; the first holds the model.

        Raises:
            ValueError: an unknown model.
            RuntimeError: ``use_gpu`` where torch sees no GPU.
        """
        if use_gpu and not torch.cuda.is_available():
            raise RuntimeError(
                "use_gpu=True, but torch sees no CUDA device; pass use_gpu=False to use the CPU"
            )
        self.use_gpu = use_gpu
        self.gpu_ids = list(gpu_ids)
        self.model = model
        self.is_train = is_train
        self.spatial = spatial
        self.model_name = f"{model} [{net}]"
        self.net: nn.Module
        if model == "lpips":
            self.net = LPIPS(
                pretrained=not is_train,
                net=net,  # type: ignore[arg-type]
                version=version,  # type: ignore[arg-type]
                spatial=spatial,
                pnet_rand=pnet_rand,
                pnet_tune=pnet_tune,
                model_path=model_path,
                eval_mode=False,
            )
        elif model == "baseline":
            self.net = LPIPS(pnet_rand=pnet_rand, net=net, lpips=False)  # type: ignore[arg-type]
        elif model in ("L2", "l2"):
            self.net = L2(use_gpu=use_gpu, colorspace=colorspace)
            self.model_name = "L2"
        elif model in ("DSSIM", "dssim", "SSIM", "ssim"):
            self.net = DSSIM(use_gpu=use_gpu, colorspace=colorspace)
            self.model_name = "SSIM"
        else:
            raise ValueError(
                f"unknown model {model!r}; expected one of lpips, baseline, l2, dssim, ssim"
            )
        if use_gpu:
            self.net.to(self.gpu_ids[0])
        self.parameters = list(self.net.parameters())
        if is_train:
            self.rankLoss = BCERankingLoss()
            if use_gpu:
                self.rankLoss.to(self.gpu_ids[0])
            self.parameters += list(self.rankLoss.net.parameters())
            self.lr = self.old_lr = lr
            self.optimizer_net = torch.optim.Adam(self.parameters, lr=lr, betas=(beta1, 0.999))
        else:
            self.net.eval()
        if use_gpu:
            self.net = nn.DataParallel(self.net, device_ids=self.gpu_ids)
        if printNet:
            print("---------- Networks initialized -------------")
            print_network(self.net)
            print("-----------------------------------------------")

    def forward(
        self, in0: Tensor | Features, in1: Tensor | Features, retPerLayer: bool = False
    ) -> Any:
        """Distances (N, 1, 1, 1) of patches (N, 3, H, W) in [-1, 1]."""
        return self.net(in0, in1, retPerLayer=retPerLayer)

    # -------------------------------------------------------------------------- one step

    def optimize_parameters(self) -> None:
        """One step on the batch of :meth:`set_input`, then :meth:`clamp_weights`."""
        self.forward_train()
        self.optimizer_net.zero_grad()
        self.backward_train()
        self.optimizer_net.step()
        self.clamp_weights()

    def clamp_weights(self) -> None:
        """Takes linear weights to the nearest that a distance allows, w >= 0."""
        model = self._model()
        if isinstance(model, LPIPS) and model.lpips:
            project_linear_weights(model)

    def set_input(self, data: Mapping[str, Any]) -> None:
        """A batch of triplets: ``ref``, ``p0``, ``p1`` (N, 3, H, W), and ``judge`` of N values."""
        names = ("ref", "p0", "p1", "judge")
        if self.use_gpu:
            data = {name: data[name].to(device=self.gpu_ids[0]) for name in names}
        self.input_ref, self.input_p0, self.input_p1, self.input_judge = (data[n] for n in names)
        self.var_ref, self.var_p0, self.var_p1 = self.input_ref, self.input_p0, self.input_p1

    def forward_train(self) -> Tensor:
        """The ranking loss of the batch."""
        ref: Tensor | Features = self.var_ref
        if isinstance(self.net, LPIPS):
            ref = self.net.encode(self.var_ref)
        self.d0 = self.forward(ref, self.var_p0)
        self.d1 = self.forward(ref, self.var_p1)
        self.var_judge = (1.0 * self.input_judge).view(self.d0.size())
        self.loss_total = self.rankLoss(self.d0, self.d1, self.var_judge * 2.0 - 1.0)
        return self.loss_total

    def backward_train(self) -> None:
        """The gradients of the loss."""
        torch.mean(self.loss_total).backward()

    @property
    def acc_r(self) -> Any:
        """Agreement of the last batch's distances with people, an array (N,)."""
        return self.compute_accuracy(self.d0, self.d1, self.input_judge)

    def compute_accuracy(self, d0: Tensor, d1: Tensor, judge: Tensor) -> Any:
        """Fraction of people who agree with the distances, an array (N,)."""
        nearer_is_second = (d1 < d0).detach().cpu().numpy().flatten()
        said = judge.detach().cpu().numpy().flatten()
        return nearer_is_second * said + (1 - nearer_is_second) * (1 - said)

    # ------------------------------------------------------------------- what is seen of it

    def get_current_errors(self) -> OrderedDict[str, Any]:
        """Means over the last batch: ``loss_total`` and ``acc_r``."""
        loss = self.loss_total.detach().cpu().numpy()
        return OrderedDict(loss_total=np.mean(loss), acc_r=np.mean(self.acc_r))

    def get_current_visuals(self) -> OrderedDict[str, Any]:
        """The first triplet of the batch as 8-bit images, 256 pixels high."""
        visuals = OrderedDict()
        for name in ("ref", "p0", "p1"):
            image = getattr(self, f"var_{name}")[:1].float()
            zoom = _VISUAL_SIZE / image.shape[2]
            size = (_VISUAL_SIZE, round(zoom * image.shape[3]))
            visuals[name] = tensor2im(F.interpolate(image, size, mode="nearest"))
        return visuals

    # --------------------------------------------------------------------- files and rates

    def save(self, path: str, label: str | int) -> None:
        """Writes ``LABEL_net_.pth``, the model, and ``LABEL_net_rank.pth`` into a folder."""
        self.save_network(self._model(), path, "", label)
        self.save_network(self.rankLoss.net, path, "rank", label)

    def save_network(
        self, network: nn.Module, path: str, network_label: str, epoch_label: str | int
    ) -> None:
        """Writes a state dict as ``EPOCH_net_LABEL.pth``."""
        file = os.path.join(path, f"{epoch_label}_net_{network_label}.pth")
        torch.save(network.state_dict(), file)

    def load_network(self, network: nn.Module, network_label: str, epoch_label: str | int) -> None:
        """Reads what :meth:`save_network` wrote into the folder ``self.save_dir``."""
        file = os.path.join(self.save_dir, f"{epoch_label}_net_{network_label}.pth")
        print(f"Loading network from {file}")
        network.load_state_dict(read_state_dict(file))

    def update_learning_rate(self, nepoch_decay: int) -> None:
        """Takes one of ``nepoch_decay`` equal parts off the learning rate."""
        rate = self.old_lr - self.lr / nepoch_decay
        for group in self.optimizer_net.param_groups:
            group["lr"] = rate
        print(f"update lr [{self.model_name}] decay: {self.old_lr:f} -> {rate:f}")
        self.old_lr = rate

    def get_image_paths(self) -> Any:
        """``self.image_paths``, which scripts may set."""
        return self.image_paths

    def save_done(self, flag: bool = False) -> None:
        """Writes ``done_flag`` into the folder ``self.save_dir``."""
        file = os.path.join(self.save_dir, "done_flag")
        np.save(file, flag)
        np.savetxt(file, [flag], fmt="%i")

    def _model(self) -> nn.Module:
        return self.net.module if isinstance(self.net, nn.DataParallel) else self.net
