"""Makes the report that docs/report.md shows, and its picture.

    python scripts/draw_report.py     # writes docs/examples/graded.html and docs/images/report.png

It runs examples/graded_report.py and needs Chromium for the picture; half a minute on two cores.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "examples" / "graded.html"
PICTURE = REPOSITORY / "docs" / "images" / "report.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is installed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In the folder, so that the page names no place of this machine but that.
        example = REPOSITORY / "examples" / "graded_report.py"
        subprocess.run([sys.executable, example, "-o", "graded"], cwd=folder, check=True)
        PAGE.parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / "graded" / "report.html", PAGE)
        picture = folder / "picture.png"
        subprocess.run(
            [
                *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *("--window-size=1280,1240", f"--user-data-dir={folder / 'profile'}"),
                *(f"--screenshot={picture}", PAGE.as_uri()),
            ],
            check=True,
            stderr=subprocess.DEVNULL,
        )
        with Image.open(picture) as image:
            # A palette: the page has few colours, and the file a third of the bytes.
            image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
                PICTURE, optimize=True
            )
    print(PAGE, PICTURE)


if __name__ == "__main__":
    main()
