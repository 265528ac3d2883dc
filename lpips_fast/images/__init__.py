"""Picture files: read as tensors, resized, and distance maps written as pictures."""

from .files import ImageError
from .heatmap import PICTURE_SUFFIXES, save_heatmap, save_map_numbers
from .masks import read_mask
from .reading import Alpha, image_to_tensor, pillow_pixels, read_image, read_image_uint8
from .resizing import Preprocessing, Resampling

__all__ = [
    "PICTURE_SUFFIXES",
    "Alpha",
    "ImageError",
    "Preprocessing",
    "Resampling",
    "image_to_tensor",
    "pillow_pixels",
    "read_image",
    "read_image_uint8",
    "read_mask",
    "save_heatmap",
    "save_map_numbers",
]
