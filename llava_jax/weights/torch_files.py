"""PyTorch's own files (.bin, .pt, .pth): pickles, opened only on request, and only for tensors.

weights_only=True lets a pickle rebuild tensors and call nothing else. A file in today's zip format
is mapped into memory; since pages of a map stay resident once they were touched, the map is opened
anew now and then, and a file of any size passes through little memory. What cannot be mapped (the
format before PyTorch 1.6, compressed zips, files in a bucket) is held in memory whole.
"""

import re
import threading
import weakref
import zipfile
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
from etils import epath

from llava_jax.weights.safetensors_header import DTYPES, quoted
from llava_jax.weights.tensor import Tensor

SUFFIXES = (".bin", ".pt", ".pth")

# How much of all maps together may become resident before they are opened anew.
_MAP_BYTES = 512 * 2**20

# PyTorch and NumPy call the dtypes by the same names.
_DTYPES = {f"torch.{dtype.name}": dtype for dtype in DTYPES.values()}
_WORDS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


def refusal(path: epath.Path) -> ValueError:
    return ValueError(
        f"{path} is a pickle, and opening a pickle can run any code; expected .safetensors. If you "
        "trust where it comes from, --allow-pickle (in Python allow_pickle=True) opens it with "
        "weights_only=True, which admits tensors only; safer is the same checkpoint as "
        ".safetensors, if its authors publish one"
    )


def read(path: epath.Path) -> dict[str, Tensor]:
    """The tensors of one file whose pickle the user has allowed."""
    file = _TorchFile(path)
    return {
        key: Tensor(tuple(value.shape), _DTYPES[str(value.dtype)], file.reader(key, value), where)
        for key, value in file.open().items()
        for where in [f"{path}: {key}"]
    }


def write(
    path: epath.Path,
    tensors: Mapping[str, Tensor],
    on_tensor: Callable[[str, np.ndarray], None] = lambda key, array: None,
) -> None:
    """A file for torch.load, for readers that know no other; held in memory whole."""
    torch = _import_torch(path)
    state = {}
    for key, tensor in tensors.items():
        array = tensor.read()
        on_tensor(key, array)
        # NumPy's bf16 is unknown to PyTorch: the bits go over as integers.
        bits = array.view(_WORDS[array.dtype.itemsize]) if array.dtype.name == "bfloat16" else array
        state[key] = torch.from_numpy(np.array(bits)).view(getattr(torch, array.dtype.name))
    with path.open("wb") as file:
        torch.save(state, file)


class _TorchFile:
    # The memory of maps is one for the process, however many shards and threads share it.
    _lock = threading.Lock()
    _touched = 0
    _files: ClassVar["weakref.WeakSet[_TorchFile]"] = weakref.WeakSet()

    def __init__(self, path: epath.Path):
        self._path = path
        self._torch = _import_torch(path)
        self._size = path.stat().length
        self._mapped = False
        self._tensors: dict[str, Any] | None = None
        self._files.add(self)

    def reader(self, key: str, tensor: Any) -> Callable[[], np.ndarray]:
        """What reads this tensor; it keeps shape and dtype in mind, not the tensor and its map."""
        promised = tuple(tensor.shape), _DTYPES[str(tensor.dtype)]

        def read() -> np.ndarray:
            array = np.empty(*promised)
            with self._lock:
                self._make_room(array.nbytes)
                tensor = self.open().get(key)
            if tensor is None or (tuple(tensor.shape), _DTYPES[str(tensor.dtype)]) != promised:
                raise self._changed(key)
            # NumPy does not know all of PyTorch's dtypes: equal words, equal bits.
            word = _WORDS[array.itemsize]
            words = tensor.resolve_conj().resolve_neg().view(getattr(self._torch, word))
            self._torch.from_numpy(array.view(word)).copy_(words)
            return array

        return read

    @classmethod
    def _make_room(cls, wanted: int) -> None:
        if cls._touched + wanted > _MAP_BYTES:
            for file in cls._files:
                if file._mapped:
                    file._tensors = None
            cls._touched = 0
        cls._touched += wanted

    def open(self) -> dict[str, Any]:
        """The file's tensors, by its map."""
        # Also for a map that is open: touching it behind the end of a file kills the process.
        if self._path.stat().length != self._size:
            raise self._changed("its size")
        if self._tensors is None:
            self._tensors = _only_tensors(self._load(), self._path, self._torch)
        return self._tensors

    def _load(self) -> Any:
        # PyTorch has no exception of its own: a bad file raises anything, KeyError and OSError too.
        try:
            self._mapped = _can_be_mapped(self._path)
            options = {"map_location": "cpu", "weights_only": True, "mmap": self._mapped}
            if self._mapped:
                return self._torch.load(str(self._path), **options)
            with self._path.open("rb") as file:
                return self._torch.load(file, **options)
        except Exception as error:
            raise ValueError(
                f"cannot read {self._path}: {_reason(error)}; expected a dict of tensors as "
                "torch.save writes it (is the file whole?)"
            ) from error

    def _changed(self, what: str) -> ValueError:
        return ValueError(
            f"{self._path}: {quoted(what)} is not what it was when the file was opened; expected a "
            "file that stays the same while it is read"
        )


def _import_torch(path: epath.Path) -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is PyTorch's own format, and PyTorch is not installed; run: pip install torch"
        ) from error
    return torch


def _can_be_mapped(path: epath.Path) -> bool:
    if "://" in str(path):
        return False
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
        with zipfile.ZipFile(file) as archive:
            # A compressed record cannot be mapped, and PyTorch would not notice.
            return all(info.compress_type == zipfile.ZIP_STORED for info in archive.filelist)


def _reason(error: Exception) -> str:
    """PyTorch's message without its advice to switch the protection off."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return f"its pickle wants to call {found[1]}, which tensors do not need"
    if "TorchScript" in text:
        return "it is a TorchScript program"
    if "Weights only load failed" in text:
        text = text.partition("WeightsUnpickler error:")[2].strip() or "no pickle of tensors"
    text = re.split(r"\. |\n", text.strip())[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _only_tensors(loaded: Any, path: epath.Path, torch: ModuleType) -> dict[str, Any]:
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}; expected a dict of tensors")
    wrong = [
        f"{quoted(key)} is {_described(value, torch)}"
        for key, value in loaded.items()
        if not (isinstance(key, str) and _is_plain(value, torch))
    ]
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise ValueError(
            f"{path}: {', '.join(wrong[:5])}{more}; expected names of tensors, and nothing else"
        )
    return loaded


def _is_plain(value: Any, torch: ModuleType) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and not value.is_nested
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and str(value.dtype) in _DTYPES
    )


def _described(value: Any, torch: ModuleType) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype}, {value.layout}, on {value.device}"
    if isinstance(value, dict):
        return f"a dict of {len(value)} entries"
    return f"a {type(value).__name__}"
