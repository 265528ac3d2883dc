"""What the installed package must do anywhere: two distances, a step of training, the command line.

    python scripts/try_package.py       # with the Python that lpips_fast is installed in

It uses nothing of the clone but the example images, and neither a compiler nor a network.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
IMAGES = REPOSITORY / "examples" / "images"
EXPECTED = {"ex_p0.png": "0.722", "ex_p1.png": "0.138"}  # as published with the original


def command_line(image: str) -> str:
    """The distance from the reference that ``lpips-fast`` prints, in the published digits."""
    command = Path(sysconfig.get_path("scripts"), "lpips-fast")
    done = subprocess.run(
        [str(command), str(IMAGES / "ex_ref.png"), str(IMAGES / image)],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(f"lpips-fast failed:\n{done.stdout}{done.stderr}")
    return f"{float(done.stdout.split()[1]):.3f}"


def steps_towards_a_target() -> tuple[float, float]:
    """The distance before and after ten steps of an image towards another."""
    import torch

    import lpips_fast

    torch.manual_seed(0)
    model = lpips_fast.LPIPS(net="alex", verbose=False, frozen=True)
    target = torch.rand(1, 3, 64, 64) * 2 - 1
    image = torch.zeros_like(target, requires_grad=True)
    optimizer = torch.optim.Adam([image], lr=0.05)
    distances = []
    for _ in range(10):
        optimizer.zero_grad()
        distance = model(image, target).sum()
        distance.backward()
        optimizer.step()
        distances.append(distance.item())
    return distances[0], distances[-1]


def main() -> None:
    import torch

    import lpips_fast

    package = Path(lpips_fast.__file__).parent
    if REPOSITORY in package.parents and "site-packages" not in package.parts:
        sys.exit(f"{package} is the clone, not an installed package")
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"lpips_fast {lpips_fast.__version__}, torch {torch.__version__}, {capability}")
    for image, expected in EXPECTED.items():
        found = command_line(image)
        print(f"lpips-fast ex_ref.png {image}: {found}")
        if found != expected:
            sys.exit(f"expected {expected}")
    before, after = steps_towards_a_target()
    print(f"ten steps of training: {before:.3f} to {after:.3f}")
    if not after < before:
        sys.exit("the distance did not fall")


if __name__ == "__main__":
    os.environ["LPIPS_FAST_OFFLINE"] = "1"
    # The script's own folder is on the path, and holds nothing that is meant.
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != REPOSITORY / "scripts"]
    main()
