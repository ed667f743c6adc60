"""Files of torch.save, read without torch, and without running what is in them."""

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C  # of the format before torch 1.6
DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}
# A pickle of text may name anything; these errors come from one that is cut or changed.
DAMAGE = (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, OSError)
DAMAGE += (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def read_torch(path: str | os.PathLike[str]) -> Any:
    """Return the content of a file of torch.save, such as a state dict.

    Args:
        path: the file, in either format of torch.

    Returns:
        dicts, lists and numbers as they are, tensors as arrays.

    Raises:
        ValueError: the file is damaged, or holds something else, such as a whole
            module, which only its own code could make.
    """
    try:
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        with Path(path).open("rb") as file:
            return _read_stream(file, Path(path).stat().st_size)
    except DAMAGE as error:
        raise ValueError(
            "read_torch: expected a file of torch.save with numbers and tensors of the "
            f"usual types, got {path}: {' '.join(str(error).split())[:200]}. Save "
            "model.state_dict(), or download it again."
        ) from error


def _read_zip(path: str | os.PathLike[str]) -> Any:
    with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
        folder = name.removesuffix("data.pkl")

        def load(dtype: np.dtype, key: str, size: int) -> np.ndarray:
            return np.frombuffer(archive.read(f"{folder}data/{key}"), dtype, size)

        return _Unpickler(BytesIO(archive.read(name)), load).load()


def _read_stream(file: BinaryIO, length: int) -> Any:
    made: dict[str, np.ndarray] = {}

    def load(dtype: np.dtype, key: str, size: int) -> np.ndarray:
        if not 0 <= size * dtype.itemsize <= length:  # before it is allocated
            raise ValueError(f"{size} numbers in a file of {length} bytes")
        # Its numbers follow later in the file.
        return made.setdefault(key, np.empty(size, dtype))

    magic, _, _, content, keys = (_Unpickler(file, load).load() for _ in range(5))
    if magic != MAGIC or {*keys} != {*made}:
        raise ValueError("another format")
    for key in keys:
        file.read(8)  # the size again
        array = made[key]
        array[...] = np.frombuffer(file.read(array.nbytes), array.dtype, array.size)
    return content


class _Unpickler(pickle.Unpickler):
    """Unpickler that makes dicts and arrays, and calls nothing that a file names."""

    def __init__(self, file: BinaryIO, load: Callable[..., np.ndarray]):
        super().__init__(file)
        self.load_storage = load

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class or function of torch."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in DTYPES:
            return np.dtype(DTYPES[name])
        raise pickle.UnpicklingError(f"{module}.{name} in it")

    def persistent_load(self, pid: tuple) -> np.ndarray:
        """Return a storage, the numbers of one or several tensors."""
        _, dtype, key, _, size, *_ = pid
        return self.load_storage(dtype, key, size)


def _tensor(
    storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any
) -> np.ndarray:
    size = storage.itemsize
    # NumPy refuses what would reach beyond the storage.
    steps = tuple(size * n for n in strides)
    return np.ndarray(shape, storage.dtype, storage.data, size * offset, steps)
