"""Image files of every kind that people have, and of every kind that must be refused."""

from __future__ import annotations

import os
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lpips_fast.images.reading import ImageError, image_to_tensor, read_image, read_image_uint8

Image = pytest.importorskip("PIL.Image", reason="reading images needs Pillow")

Pixels = Callable[..., np.ndarray]


@pytest.fixture
def pixels() -> Pixels:
    """A source of fresh random arrays; the seed is printed when a test fails."""
    generator = torch.Generator()
    print(f"seed {generator.seed()}")

    def draw(*shape: int, high: int = 256, dtype: Any = np.uint8) -> np.ndarray:
        return torch.randint(high, shape, generator=generator).numpy().astype(dtype)

    return draw


def png(
    rows: np.ndarray,
    *,
    bits: int,
    colour_type: int,
    transparent: bytes | None = None,
    palette: bytes | None = None,
    extra: bytes = b"",
) -> bytes:
    """Write a PNG by hand, for the kinds that Pillow reads and does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width = rows.shape[:2]
    if bits == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    elif bits == 8:
        lines = [row.astype(np.uint8).tobytes() for row in rows]
    else:
        digits = ["".join(f"{value:0{bits}b}" for value in row) for row in rows]
        lines = [
            bytes(int(d[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(d), 8)) for d in digits
        ]
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + (chunk(b"PLTE", palette) if palette else b"")
        + (chunk(b"tRNS", transparent) if transparent else b"")
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines)))
        + chunk(b"IEND", b"")
    )


def gray_tiff(data: bytes, width: int, height: int, *, bits: int, photometric: int) -> bytes:
    """Write a little-endian, uncompressed, one-channel TIFF by hand."""
    entries = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, height),
        (279, 4, len(data)),
    ]
    padded = data + b"\0" * (len(data) % 2)
    directory = struct.pack("<H", len(entries))
    for tag, kind, value in entries:
        directory += struct.pack("<HHII", tag, kind, 1, value)
    return b"II*\0" + struct.pack("<I", 8 + len(padded)) + padded + directory + b"\0\0\0\0"


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    opacity = alpha[..., None].astype(np.float64) / 255
    return np.floor(colours * opacity + 255 * (1 - opacity) + 0.5).astype(np.uint8)


# ------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("png", {}),
        ("bmp", {}),
        ("tiff", {}),
        ("tif", {"compression": "tiff_lzw"}),
        ("webp", {"lossless": True}),
        ("ppm", {}),
    ],
)
def test_lossless_formats_come_back_unchanged(
    tmp_path: Path, pixels: Pixels, suffix: str, options: dict[str, Any]
) -> None:
    image = pixels(13, 17, 3)
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(image).save(path, **options)
    read = read_image_uint8(path)
    np.testing.assert_array_equal(read, image)
    assert read.flags.writeable and read.flags.c_contiguous
    tensor = read_image(path)
    assert tensor.shape == (1, 3, 13, 17)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()


@pytest.mark.parametrize(
    ("suffix", "options"), [("jpg", {"quality": 90}), ("webp", {"quality": 80})]
)
def test_lossy_formats_are_pillows_pixels(
    tmp_path: Path, pixels: Pixels, suffix: str, options: dict[str, Any]
) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(pixels(24, 31, 3)).save(path, **options)
    with Image.open(path) as image:
        np.testing.assert_array_equal(read_image_uint8(path), np.asarray(image))


def test_each_value_is_the_originals_to_the_bit() -> None:
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    # The original's im2tensor: float64 arithmetic, one rounding.
    expected = torch.Tensor((image / (255.0 / 2.0) - 1.0)[:, :, :, None].transpose(3, 2, 0, 1))
    assert torch.equal(image_to_tensor(image), expected)
    assert expected.min() == -1 and expected.max() == 1


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3))]
)
def test_image_to_tensor_refuses_other_arrays(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected a uint8 array of shape \(H, W, 3\), got"):
        image_to_tensor(image)


def test_grayscale_is_replicated(tmp_path: Path, pixels: Pixels) -> None:
    gray = pixels(9, 7)
    path = tmp_path / "gray.png"
    Image.fromarray(gray).save(path)
    np.testing.assert_array_equal(read_image_uint8(path), np.stack([gray] * 3, axis=2))


def test_black_and_white_is_0_and_255(tmp_path: Path, pixels: Pixels) -> None:
    bits = pixels(9, 16, high=2)
    path = tmp_path / "bits.png"
    path.write_bytes(png(bits, bits=1, colour_type=0))
    np.testing.assert_array_equal(read_image_uint8(path)[..., 1], bits * 255)


def test_palette(tmp_path: Path, pixels: Pixels) -> None:
    index, colours = pixels(8, 8, high=5), pixels(5, 3)
    path = tmp_path / "palette.png"
    path.write_bytes(png(index, bits=8, colour_type=3, palette=colours.tobytes()))
    np.testing.assert_array_equal(read_image_uint8(path, alpha="refuse"), colours[index])


@pytest.mark.parametrize("bits", [4, 8])
def test_palette_with_transparency(tmp_path: Path, pixels: Pixels, bits: int) -> None:
    index, colours, alpha = pixels(8, 8, high=5), pixels(5, 3), pixels(5)
    index[0, 0], alpha[0] = 0, 100
    path = tmp_path / "palette.png"
    path.write_bytes(
        png(
            index,
            bits=bits,
            colour_type=3,
            palette=colours.tobytes(),
            transparent=alpha[:3].tobytes(),
        )
    )
    alpha[3:] = 255  # a tRNS chunk shorter than the palette leaves the rest opaque
    expected = on_white(colours[index], alpha[index])
    np.testing.assert_array_equal(read_image_uint8(path), expected)
    np.testing.assert_array_equal(read_image_uint8(path, alpha="drop"), colours[index])
    with pytest.raises(ImageError, match=r"palette\.png' has transparent pixels"):
        read_image_uint8(path, alpha="refuse")


# ------------------------------------------------------------------------------- 16 bits


def test_16_bit_gray_is_scaled_not_clipped(tmp_path: Path, pixels: Pixels) -> None:
    gray = pixels(8, 9, high=65536, dtype=np.uint16)
    gray[0, :5] = [0, 255, 256, 65280, 65535]
    expected = np.stack([gray >> 8] * 3, axis=2)
    for suffix in ("png", "tif"):
        path = tmp_path / f"gray.{suffix}"
        Image.fromarray(gray).save(path)
        np.testing.assert_array_equal(read_image_uint8(path), expected)


def test_8_bit_values_stored_in_16_bits_come_back(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    path = tmp_path / "gray.png"
    path.write_bytes(png(values * 257, bits=16, colour_type=0))
    np.testing.assert_array_equal(read_image_uint8(path)[..., 0], values)


def test_16_bit_rgb_agrees_with_16_bit_gray(tmp_path: Path, pixels: Pixels) -> None:
    image = pixels(6, 5, 3, high=65536, dtype=np.uint16)
    path = tmp_path / "rgb16.png"
    path.write_bytes(png(image, bits=16, colour_type=2))
    np.testing.assert_array_equal(read_image_uint8(path), image >> 8)


def test_16_bit_rgba(tmp_path: Path, pixels: Pixels) -> None:
    image = pixels(6, 5, 4, high=65536, dtype=np.uint16)
    image[0, 0, 3] = 0
    path = tmp_path / "rgba16.png"
    path.write_bytes(png(image, bits=16, colour_type=6))
    high = image >> 8
    np.testing.assert_array_equal(read_image_uint8(path), on_white(high[..., :3], high[..., 3]))


def test_16_bit_tiff_with_white_at_zero(tmp_path: Path, pixels: Pixels) -> None:
    gray = pixels(5, 6, high=65536, dtype=np.uint16)
    path = tmp_path / "negative.tif"
    path.write_bytes(gray_tiff(gray.astype("<u2").tobytes(), 6, 5, bits=16, photometric=0))
    np.testing.assert_array_equal(read_image_uint8(path)[..., 0], (65535 - gray) >> 8)


def test_12_bit_tiff_is_not_read_as_nearly_black(tmp_path: Path, pixels: Pixels) -> None:
    gray = pixels(4, 6, high=4096, dtype=np.uint16)
    gray[0, 0] = 4095
    bits = "".join(f"{value:012b}" for value in gray.reshape(-1))
    data = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    path = tmp_path / "twelve.tif"
    path.write_bytes(gray_tiff(data, 6, 4, bits=12, photometric=1))
    np.testing.assert_array_equal(read_image_uint8(path)[..., 0], gray >> 4)


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (np.ones((4, 4), np.float32), "floating-point"),
        (np.ones((4, 4), np.int32), "signed or 32-bit"),
    ],
)
def test_pixels_without_a_known_white_are_refused(
    tmp_path: Path, array: np.ndarray, kind: str
) -> None:
    path = tmp_path / "numbers.tif"
    Image.fromarray(array).save(path)
    with pytest.raises(ImageError, match=rf"it holds {kind} pixels"):
        read_image(path)


# ------------------------------------------------------------------------------- alpha


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_rgba(tmp_path: Path, pixels: Pixels, suffix: str) -> None:
    image = pixels(11, 6, 4)
    image[0, 0, 3], image[0, 1, 3], image[0, 2, 3] = 0, 255, 128
    path = tmp_path / f"rgba.{suffix}"
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    Image.fromarray(image).save(path, **options)
    white = read_image_uint8(path)
    np.testing.assert_array_equal(white, on_white(image[..., :3], image[..., 3]))
    np.testing.assert_array_equal(white[0, 0], [255, 255, 255])
    np.testing.assert_array_equal(white[0, 1], image[0, 1, :3])
    np.testing.assert_array_equal(read_image_uint8(path, alpha="drop"), image[..., :3])
    with pytest.raises(ImageError, match="transparent pixels; flatten it first"):
        read_image(path, alpha="refuse")


def test_gray_with_alpha(tmp_path: Path, pixels: Pixels) -> None:
    image = pixels(5, 6, 2)
    image[0, 0, 1] = 3
    path = tmp_path / "la.png"
    path.write_bytes(png(image, bits=8, colour_type=4))
    gray = np.stack([image[..., 0]] * 3, axis=2)
    np.testing.assert_array_equal(read_image_uint8(path), on_white(gray, image[..., 1]))
    np.testing.assert_array_equal(read_image_uint8(path, alpha="drop"), gray)


def test_an_opaque_alpha_channel_is_no_transparency(tmp_path: Path, pixels: Pixels) -> None:
    image = pixels(5, 6, 4)
    image[..., 3] = 255
    path = tmp_path / "opaque.png"
    Image.fromarray(image).save(path)
    for alpha in ("white", "drop", "refuse"):
        np.testing.assert_array_equal(read_image_uint8(path, alpha=alpha), image[..., :3])


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_transparent_gray_level_of_any_depth(
    tmp_path: Path, pixels: Pixels, bits: int, zero: bool
) -> None:
    levels = 2**bits
    gray = pixels(8, 16, high=levels, dtype=np.uint16)
    key = 0 if zero else 1 + int(pixels(1, high=levels - 1, dtype=np.uint16)[0])
    gray[3, 3] = key
    path = tmp_path / "key.png"
    path.write_bytes(png(gray, bits=bits, colour_type=0, transparent=struct.pack(">H", key)))
    eight = gray >> 8 if bits == 16 else gray * (255 // (levels - 1))
    expected = np.where(gray == key, 255, eight)
    np.testing.assert_array_equal(read_image_uint8(path)[..., 2], expected)
    np.testing.assert_array_equal(read_image_uint8(path, alpha="drop")[..., 2], eight)
    with pytest.raises(ImageError, match="transparent pixels"):
        read_image(path, alpha="refuse")


def test_transparent_colour(tmp_path: Path, pixels: Pixels) -> None:
    image = pixels(6, 6, 3)
    image[1, 1] = image[4, 2] = image[0, 0]
    path = tmp_path / "key.png"
    path.write_bytes(
        png(image, bits=8, colour_type=2, transparent=struct.pack(">3H", *image[0, 0].tolist()))
    )
    expected = np.where((image == image[0, 0]).all(axis=2, keepdims=True), 255, image)
    np.testing.assert_array_equal(read_image_uint8(path), expected)


def test_transparent_16_bit_colour_is_refused_unless_dropped(
    tmp_path: Path, pixels: Pixels
) -> None:
    image = pixels(6, 6, 3, high=65536, dtype=np.uint16)
    path = tmp_path / "key16.png"
    path.write_bytes(
        png(image, bits=16, colour_type=2, transparent=struct.pack(">3H", *image[0, 0].tolist()))
    )
    with pytest.raises(ImageError, match="16-bit RGB with a transparent colour"):
        read_image(path)
    np.testing.assert_array_equal(read_image_uint8(path, alpha="drop"), image >> 8)


def test_an_unknown_alpha_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="alpha is 'black', expected one of 'white', 'drop', 'refuse'"
    ):
        read_image(tmp_path / "any.png", alpha="black")  # type: ignore[arg-type]


# ---------------------------------------------------------------- orientation and profiles

# How to bring the stored pixels upright, by the EXIF specification's value.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_is_applied_once(
    tmp_path: Path, pixels: Pixels, suffix: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain, turned = tmp_path / f"plain.{suffix}", tmp_path / f"turned.{suffix}"
    image = Image.fromarray(pixels(24, 32, 3))
    image.save(plain)
    image.save(turned, exif=exif)
    expected = UPRIGHT[orientation](read_image_uint8(plain))
    assert expected.shape == ((32, 24, 3) if orientation > 4 else (24, 32, 3))
    np.testing.assert_array_equal(read_image_uint8(turned), expected)


def test_orientation_of_16_bit_gray_and_of_a_transparent_palette(
    tmp_path: Path, pixels: Pixels
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    gray = pixels(4, 7, high=65536, dtype=np.uint16)
    Image.fromarray(gray).save(tmp_path / "gray.png", exif=exif)
    read = read_image_uint8(tmp_path / "gray.png")
    np.testing.assert_array_equal(read[..., 0], np.rot90(gray >> 8, -1))

    index, colours = pixels(4, 7, high=3), pixels(3, 3)
    palette = Image.fromarray(index)
    palette.putpalette(colours.tobytes())
    palette.save(tmp_path / "palette.png", exif=exif, transparency=b"\x00\xff\xff")
    colours[0] = 255
    read = read_image_uint8(tmp_path / "palette.png")
    np.testing.assert_array_equal(read, np.rot90(colours[index], -1))


def test_an_icc_profile_is_left_alone(tmp_path: Path, pixels: Pixels) -> None:
    cms = pytest.importorskip("PIL.ImageCms", reason="Pillow was built without LittleCMS")
    profile = cms.ImageCmsProfile(cms.createProfile("LAB")).tobytes()
    image = pixels(5, 5, 3)
    path = tmp_path / "profile.png"
    Image.fromarray(image).save(path, icc_profile=profile)
    np.testing.assert_array_equal(read_image_uint8(path), image)


def test_cmyk_is_converted(tmp_path: Path) -> None:
    path = tmp_path / "cmyk.tif"
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(path)
    np.testing.assert_array_equal(read_image_uint8(path)[0, 0], [255, 0, 0])


# --------------------------------------------------------------------------- refusals


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"cannot read '.*gone\.png': no such file$"):
        read_image(tmp_path / "gone.png")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="it is a folder, expected an image file"):
        read_image(tmp_path)


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    with pytest.raises(ImageError, match="the file is empty"):
        read_image(path)


@pytest.mark.parametrize("content", [b"plain text\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG"])
def test_no_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"notes\.png': not an image of a supported format \(PNG,"):
        read_image(path)


def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "locked.png"
    path.touch()
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    with pytest.raises(ImageError, match="Permission denied"):
        read_image(path)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("png", {}),
        ("jpg", {}),
        ("jpg", {"progressive": True}),
        ("webp", {}),
        ("bmp", {}),
        ("tif", {}),
        ("tif", {"compression": "tiff_deflate"}),
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning")
def test_a_file_cut_short_is_never_read_in_part(
    tmp_path: Path, pixels: Pixels, suffix: str, options: dict[str, Any]
) -> None:
    path = tmp_path / f"whole.{suffix}"
    Image.fromarray(pixels(32, 32, 3)).save(path, **options)
    whole, data = read_image_uint8(path), path.read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    refused = 0
    for length in {len(data) * part // 20 for part in range(1, 20)} | {len(data) - 3}:
        cut.write_bytes(data[:length])
        try:
            # What is cut off may be a trailer without pixels. What is read is then everything.
            np.testing.assert_array_equal(read_image_uint8(cut), whole)
        except ImageError as error:
            assert f"cut.{suffix}'" in str(error)
            assert "\n" not in str(error)
            refused += 1
    assert refused >= 18


def test_damaged_pixels_name_the_cause(tmp_path: Path, pixels: Pixels) -> None:
    path = tmp_path / "cut.jpg"
    Image.fromarray(pixels(32, 32, 3)).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ImageError, match=r"damaged or cut short: .*truncated") as caught:
        read_image(path)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("limit", [199, 99])  # Pillow warns above the limit, raises above twice it
def test_bomb(tmp_path: Path, pixels: Pixels, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    image = pixels(10, 20, 3)
    path = tmp_path / "bomb.png"
    Image.fromarray(image).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=rf"declares more pixels .* \({limit}\) allows"):
            read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    np.testing.assert_array_equal(read_image_uint8(path), image)


def test_a_bomb_is_refused_from_its_header(tmp_path: Path) -> None:
    tiny = png(np.zeros((1, 1), np.uint8), bits=8, colour_type=0)
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + tiny[24:29]
    path = tmp_path / "bomb.png"
    path.write_bytes(tiny[:12] + header + struct.pack(">I", zlib.crc32(header)) + tiny[33:])
    with pytest.raises(ImageError, match="refusing to read"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_several_frames_are_refused(tmp_path: Path, pixels: Pixels, suffix: str) -> None:
    frames = [Image.fromarray(pixels(8, 8, 3)) for _ in range(3)]
    path = tmp_path / f"frames.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="holds 3 frames or pages, and one image was expected"):
        read_image(path)


def test_one_frame_of_an_animated_format_is_an_image(tmp_path: Path) -> None:
    path = tmp_path / "still.gif"
    Image.new("P", (6, 5), 0).save(path)
    assert read_image(path).shape == (1, 3, 5, 6)


def test_a_camera_file_is_its_photograph(tmp_path: Path, pixels: Pixels) -> None:
    photograph, preview = Image.fromarray(pixels(16, 24, 3)), Image.new("RGB", (8, 8))
    path = tmp_path / "camera.jpg"
    photograph.save(path, format="MPO", save_all=True, append_images=[preview])
    plain = tmp_path / "plain.jpg"
    photograph.save(plain)
    np.testing.assert_array_equal(read_image_uint8(path), read_image_uint8(plain))


def test_missing_pillow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (4, 4)).save(path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'pip install "lpips-fast\[images\]"'):
        read_image(path)


# --------------------------------------------------------------------- names and threads


@pytest.mark.parametrize("name", ["two words.png", "Übergröße – 画像.png", "50%.png", "no suffix"])
def test_names(tmp_path: Path, pixels: Pixels, name: str) -> None:
    image = pixels(4, 5, 3)
    path = tmp_path / name
    Image.fromarray(image).save(path, format="PNG")
    np.testing.assert_array_equal(read_image_uint8(path), image)
    np.testing.assert_array_equal(read_image_uint8(str(path)), image)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has names that are not text")
def test_a_name_that_is_not_text_can_be_told(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"bad\xff.png")
    with pytest.raises(ImageError, match="no such file") as caught:
        read_image(path)
    str(caught.value).encode("utf-8")


def test_threads_do_not_disturb_the_warning_filters(tmp_path: Path, pixels: Pixels) -> None:
    image = pixels(16, 16, 3)
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)
    before = list(warnings.filters)
    same: list[bool] = []
    threads = [
        threading.Thread(
            target=lambda: same.extend(
                np.array_equal(read_image_uint8(path), image) for _ in range(20)
            )
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 80
    assert list(warnings.filters) == before
