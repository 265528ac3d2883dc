"""What a `.pth` file claims to hold against what is there, before torch reads any of it.

torch allocates and maps what a checkpoint claims. A record that is shorter than its tensor is then
filled with whatever follows it, a tensor larger than its storage with whatever the memory held,
and a compressed record may grow a thousandfold. So the file's directory and its pickle are looked
through first. Nothing in the pickle is executed: every name in it stands for an inert object.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import torch

_ZIP_HEAD = b"PK\x03\x04"
#: The number with which files of torch before 1.6 begin, pickled.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_ITEM_SIZES = {
    **{"DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2},
    **{"LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1},
    **{"BoolStorage": 1, "ComplexDoubleStorage": 16, "ComplexFloatStorage": 8},
    **{"QInt8Storage": 1, "QUInt8Storage": 1, "QInt32Storage": 4, "QUInt4x2Storage": 1},
    **{"QUInt2x4Storage": 1, "UntypedStorage": 1},
}


class RecordError(ValueError):
    """What a file claims and what it holds do not agree; the message says how."""


def is_zip(path: str | os.PathLike[str]) -> bool:
    """Whether torch takes a file for one of its zip archives: by its first bytes."""
    with open(path, "rb") as file:
        return file.read(4) == _ZIP_HEAD


def check_records(path: str | os.PathLike[str]) -> None:
    """Look through a checkpoint of torch without reading its tensors.

    Raises:
        RecordError: it is a zip bomb, or a tensor in it is larger than its record.
        Exception: of many kinds, where the file is damaged or of another format.
    """
    if is_zip(path):
        _check_archive(path)
    else:
        _check_legacy(path)


def _check_archive(path: str | os.PathLike[str]) -> None:
    size = os.path.getsize(path)
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: info for info in archive.infolist()}
        for name, info in records.items():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise RecordError(
                    f"its record {name!r} is compressed, from {info.file_size} bytes to "
                    f"{info.compress_size}, which torch.save never does"
                )
        inflated = sum(info.file_size for info in archive.infolist())
        if inflated > size:
            raise RecordError(f"its records claim {inflated} bytes and the file has {size}")
        pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise RecordError(f"it holds {len(pickles)} records 'data.pkl', expected one")
        folder = pickles[0].removesuffix("data.pkl")
        # Bounded by the size of the file, as nothing is compressed.
        with archive.open(pickles[0]) as file:
            storages = _Claims(file).storages_of_next()  # type: ignore[arg-type]
    for key, storage in storages.items():
        record = records.get(f"{folder}data/{key}")
        if record is None:
            raise RecordError(f"it has no record {folder}data/{key}, which a tensor needs")
        if record.file_size < storage.size:
            raise RecordError(
                f"its record {record.filename!r} is of {record.file_size} bytes, "
                f"and its tensor needs {storage.size}"
            )


def _check_legacy(path: str | os.PathLike[str]) -> None:
    with open(path, "rb") as file:
        if _Claims(file).load() != _LEGACY_MAGIC:
            raise ValueError("it does not begin like a checkpoint of torch")
        for _ in ("protocol version", "system information"):
            _Claims(file).load()
        storages = _Claims(file).storages_of_next()
    # torch compares each one's size with its record itself, after it has allocated them.
    claimed, size = sum(storage.size for storage in storages.values()), os.path.getsize(path)
    if claimed > size:
        raise RecordError(f"its tensors claim {claimed} bytes and the file has {size}")


class _Storage(NamedTuple):
    elements: int
    item_size: int

    @property
    def size(self) -> int:
        return self.elements * self.item_size


class _Inert:
    """Stands for every class and object in a pickle: it takes everything and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass

    add = append


class _StorageType(NamedTuple):
    item_size: int


# The pickle module's own code in Python: the one in C allocates what indices in the file ask for.
class _Claims(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Reads a checkpoint's pickle for the storages and tensors that it claims, and nothing else."""

    # These allocate what the file claims before it is read; torch.save does not use them.
    dispatch = {  # noqa: RUF012
        code: read
        for code, read in pickle._Unpickler.dispatch.items()  # type: ignore[attr-defined]
        if code not in {pickle.BYTEARRAY8[0], pickle.NEXT_BUFFER[0], pickle.READONLY_BUFFER[0]}
    }

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8")
        self._storages: dict[str, _Storage] = {}

    def storages_of_next(self) -> dict[str, _Storage]:
        """Read the next pickle in the file; the storages that it names, by their keys."""
        self.load()
        return self._storages

    def find_class(self, module: str, name: str) -> Any:
        if name in _ITEM_SIZES and module in ("torch", "torch.storage", "torch.cuda"):
            return _StorageType(_ITEM_SIZES[name])
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module == "torch._utils" and name in _REBUILDERS:
            return _REBUILDERS[name]
        if (module, name) in (("builtins", "bytearray"), ("__builtin__", "bytearray")):
            raise RecordError("it holds a bytearray, which is no part of weights")
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        kind, storage_type, key, _, count, *_ = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise RecordError(f"it refers to {kind!r}, expected a storage")
        if not isinstance(count, int) or count < 0:
            raise RecordError(f"its storage {key!r} has {count!r} elements")
        storage = _Storage(count, storage_type.item_size)
        if self._storages.setdefault(str(key), storage) != storage:
            raise RecordError(f"its storage {key!r} has two sizes")
        return storage


def _rebuild_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *_: Any, item_size: int | None = None
) -> _Inert:
    """The extent of a tensor must lie in its storage: torch would enlarge the storage else."""
    numbers = (offset, *size, *stride)
    if any(not isinstance(number, int) or number < 0 for number in numbers):
        raise RecordError(f"it holds a tensor with offset, shape and strides {numbers}")
    if len(size) != len(stride):
        raise RecordError(f"it holds a tensor of shape {size} with strides {stride}")
    if 0 not in size:
        last = offset + sum((length - 1) * step for length, step in zip(size, stride))
        if (last + 1) * (item_size or storage.item_size) > storage.size:
            raise RecordError(
                f"it holds a tensor of shape {tuple(size)} whose storage has "
                f"{storage.elements} elements"
            )
    return _Inert()


def _rebuild_tensor_of_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, *options: Any
) -> _Inert:
    dtype = next(option for option in options if isinstance(option, torch.dtype))
    return _rebuild_tensor(storage, offset, size, stride, item_size=dtype.itemsize)


_REBUILDERS: Mapping[str, Callable[..., _Inert]] = {
    "_rebuild_tensor": _rebuild_tensor,
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_qtensor": _rebuild_tensor,
    "_rebuild_tensor_v3": _rebuild_tensor_of_dtype,
}
