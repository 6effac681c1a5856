"""Files of ``torch.save`` that hold whole modules, read without importing or running anything they name.

A pickle is a program: it names globals and calls them. Here every name it may use stands for a class of this file that only
keeps what it is given, and any other name is refused (Python's documentation of ``pickle``, "Restricting Globals").
``torch.load(weights_only=True)`` cannot serve: it refuses the older of torch's two formats when modules are in it, since
their source comes with them. Both formats are read, of torch 0.4 and later. Knows nothing of captioners.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from capray.errors import CheckpointError

_MAGIC = 0x1950A86A20F9469CFC6C
"""What a file of the older format begins with, pickled."""

_MODULES = ("torch.nn.modules.", "torch.nn.parallel.data_parallel.", "torchvision.models.resnet.")
"""Where torch's and torchvision's own modules lie."""

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Ignored:
    """Stands for what a checkpoint carries besides its modules: optimizers, numpy's numbers, devices. Keeps nothing."""

    def __init__(self, *_: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass


class Module:
    """Stands for a module: the ``attributes`` it was saved with. Its class is a subclass named as the module's was."""

    attributes: Mapping[str, Any] = MappingProxyType({})

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"a module whose state is of type {type(state).__name__}")
        self.attributes = state

    def child(self, name: str) -> Module | None:
        """The module under the dotted ``name``, if there is one."""
        found: object = self
        for part in name.split("."):
            found = dict(found._members("_modules")).get(part) if isinstance(found, Module) else None
        return found if isinstance(found, Module) else None

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers under the names ``state_dict`` gives them."""
        for kind in ("_parameters", "_buffers"):
            for name, value in self._members(kind):
                if isinstance(value, Tensor):
                    yield prefix + name, value
        for name, module in self._members("_modules"):
            if isinstance(module, Module):
                yield from module.tensors(f"{prefix}{name}.")

    def _members(self, kind: str) -> list[tuple[str, object]]:
        members = self.attributes.get(kind)
        return [(str(name), value) for name, value in dict.items(members)] if isinstance(members, dict) else []


class Storage(NamedTuple):
    """The numbers behind tensors: which of the file's blocks, and of what type."""

    key: str
    dtype: torch.dtype


class Tensor:
    """Stands for a tensor: a strided view of a storage."""

    def __init__(self, storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object):
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a tensor with a state")


class _Parameter:
    """Stands for the functions that make a parameter of a tensor: gives the tensor."""

    def __new__(cls, data: Tensor, *_: object) -> Tensor:
        return data

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a parameter with a state")


_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "torch._utils._rebuild_tensor": Tensor,
    "torch._utils._rebuild_tensor_v2": Tensor,
    "torch._utils._rebuild_parameter": _Parameter,
    "torch._utils._rebuild_parameter_with_state": _Parameter,
    "torch.nn.parameter.Parameter": _Parameter,  # torch 0.4.0
    "torch.nn.backends.thnn._get_thnn_function_backend": Ignored,  # before torch 1.5
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
    **dict.fromkeys(
        (
            "collections.defaultdict",
            "builtins.dict",
            "torch.device",
            "numpy.core.multiarray.scalar",
            "numpy._core.multiarray.scalar",
            "numpy.dtype",
            "_codecs.encode",
        ),
        Ignored,
    ),
}


class _Refused(pickle.UnpicklingError):
    """A global that is not on the list."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, modules: Collection[str]):
        super().__init__(file, encoding="utf-8")
        self._modules = modules
        self._stand_ins: dict[str, type[Module]] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}".replace("__builtin__.", "builtins.")
        if path in _KNOWN:
            return _KNOWN[path]
        if path.startswith("torch.optim."):
            return Ignored
        if path not in self._modules and not path.startswith(_MODULES):
            raise _Refused(path)
        if path not in self._stand_ins:
            self._stand_ins[path] = type(name, (Module,), {"__module__": module})
        return self._stand_ins[path]

    def persistent_load(self, pid: Any) -> Any:
        kind, *what = pid
        if kind == "module":
            return what[0]
        dtype, key, *_ = what
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"an unknown kind of reference: {kind!r}")
        self.dtypes[str(key)] = dtype
        return Storage(str(key), dtype)


class TorchFile:
    """The contents of a file of ``torch.save``: ``root``, with stand-ins for its modules, and its tensors.

    Args:
        data: the file.
        uri: its name, for errors.
        modules: dotted names of the modules' classes it may hold besides torch's and torchvision's own.

    Raises:
        CheckpointError: the file is damaged, is none of ``torch.save``, or names a global that is not on the list.
    """

    root: Any

    def __init__(self, data: bytes, uri: str, modules: Collection[str]):
        self.uri = uri
        self._modules = modules
        self._blocks: dict[str, memoryview] = {}
        with self._errors():
            if data.startswith(b"PK\x03\x04"):
                self._read_zip(data)
            else:
                self._read_legacy(data)

    def state_dict(self, module: Module) -> dict[str, torch.Tensor]:
        """The tensors of ``module`` under the names its ``state_dict`` had for them.

        Raises:
            CheckpointError: the file is damaged.
        """
        with self._errors():
            return {name: self._tensor(tensor) for name, tensor in module.tensors()}

    def _tensor(self, tensor: Tensor) -> torch.Tensor:
        block, dtype = self._blocks[tensor.storage.key], tensor.storage.dtype
        if math.prod(tensor.size) * dtype.itemsize > len(block):
            raise ValueError(f"a tensor of size {tensor.size} in {len(block)} bytes")
        values = torch.frombuffer(bytearray(block), dtype=dtype)
        return values.as_strided(tensor.size, tensor.stride, tensor.offset).contiguous()

    @contextmanager
    def _errors(self) -> Generator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except _Refused as error:
            raise CheckpointError(
                f"{self.uri!r} is refused: it names {error}, which is no part of such a checkpoint; nothing of the file "
                "was executed"
            ) from error
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise CheckpointError(f"{self.uri!r} is damaged or cut off: {type(error).__name__}: {reason}") from error

    def _unpickle(self, file: io.BytesIO) -> tuple[Any, dict[str, torch.dtype]]:
        unpickler = _Unpickler(file, self._modules)
        return unpickler.load(), unpickler.dtypes

    def _check_byte_order(self, is_little: bool) -> None:
        if not is_little:
            raise CheckpointError(f"{self.uri!r} was written on a big-endian machine, which is not supported")

    def _read_zip(self, data: bytes) -> None:
        archive = zipfile.ZipFile(io.BytesIO(data))
        names = archive.namelist()
        folders = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
        if len(folders) != 1:
            raise CheckpointError(f"{self.uri!r} is a zip file, but none of torch.save: it has no data.pkl")
        (folder,) = folders
        if f"{folder}byteorder" in names:
            self._check_byte_order(archive.read(f"{folder}byteorder") == b"little")
        self.root, dtypes = self._unpickle(io.BytesIO(archive.read(f"{folder}data.pkl")))
        self._blocks = {key: memoryview(archive.read(f"{folder}data/{key}")) for key in dtypes}

    def _read_legacy(self, data: bytes) -> None:
        file = io.BytesIO(data)
        try:
            magic, _ = self._unpickle(file)
        except _Refused:
            raise
        except Exception:
            magic = None
        if magic != _MAGIC:
            raise CheckpointError(f"{self.uri!r} is no file of torch.save: it begins with {data[:8]!r}")
        self._unpickle(file)
        self._check_byte_order(self._unpickle(file)[0]["little_endian"])
        self.root, dtypes = self._unpickle(file)
        keys, _ = self._unpickle(file)
        position = file.tell()
        for key in map(str, keys):
            (count,) = struct.unpack_from("<q", data, position)
            start = position + 8
            position = start + count * dtypes[key].itemsize
            if not start <= position <= len(data):
                raise EOFError(f"{len(data)} bytes, {position} expected")
            self._blocks[key] = memoryview(data)[start:position]
