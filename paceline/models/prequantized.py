"""Checkpoints whose weights are integers: GPTQ, AWQ, AutoRound and compressed-tensors.

On a GPU the library that wrote such a checkpoint runs it, if it is installed. Elsewhere the integers are unpacked to
the weights they stand for, one layer at a time, as they are asked for: on a CPU these lie on a grid of 4 or 8 bits
again, which `paceline.engine.packed` finds. Activations are not rounded then, whatever the checkpoint says of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from paceline.errors import ModelError
from paceline.models import unpacking
from paceline.models.files import weight_files
from paceline.models.unpacking import Shapes, Tensors

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

LIBRARIES = {"gptq": ("gptqmodel", "optimum"), "awq": ("gptqmodel",), "auto-round": ("auto_round",)}
"""What Transformers needs to run a method's checkpoints as they are."""
BITS = (2, 4, 8)


class Packing(ABC):
    """Where a method keeps a layer's integers."""

    marker: ClassVar[str]
    """Last name of a tensor that only quantized layers have."""
    parts: ClassVar[frozenset[str]]
    """Last names of what is unpacked, or of no use afterwards."""

    @abstractmethod
    def shape(self, shapes: Shapes, tensors: Tensors) -> tuple[int, ...]:
        """Of the weight: [out, in]. Raises ModelError if it is packed in another way."""

    @abstractmethod
    def unpack(self, tensors: Tensors) -> torch.Tensor:
        """The weight, float32 [out, in]."""


@dataclass(frozen=True, slots=True)
class Gptq(Packing):
    """`zero_offset` as in `unpacking.gptq`."""

    group_size: int
    zero_offset: int
    marker = "qweight"
    parts = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    def shape(self, shapes: Shapes, tensors: Tensors) -> tuple[int, ...]:  # noqa: ARG002
        if (bits := unpacking.gptq_bits(shapes)) not in BITS:
            raise ModelError(f"GPTQ weights of {bits:g} bits are not unpacked; those of {BITS} are")
        return unpacking.gptq_shape(shapes)[::-1]

    def unpack(self, tensors: Tensors) -> torch.Tensor:
        return unpacking.gptq(tensors, self.group_size, self.zero_offset)


@dataclass(frozen=True, slots=True)
class Awq(Packing):
    marker = "qweight"
    parts = frozenset({"qweight", "qzeros", "scales"})

    def shape(self, shapes: Shapes, tensors: Tensors) -> tuple[int, ...]:  # noqa: ARG002
        return unpacking.awq_shape(shapes)[::-1]

    def unpack(self, tensors: Tensors) -> torch.Tensor:
        return unpacking.awq(tensors)


@dataclass(frozen=True, slots=True)
class Compressed(Packing):
    """`block` as in `unpacking.compressed`."""

    block: tuple[int, int] | None
    marker = "weight_scale"
    parts = frozenset(
        {"weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx", "input_scale"}
    )

    def shape(self, shapes: Shapes, tensors: Tensors) -> tuple[int, ...]:
        return tuple(tensors["weight_shape"].tolist()) if "weight_shape" in shapes else shapes["weight"]

    def unpack(self, tensors: Tensors) -> torch.Tensor:
        return unpacking.compressed(tensors, self.block)


COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def quantization_method(config: PretrainedConfig) -> str | None:
    """How a checkpoint is quantized, by its config.json; None if it is not."""
    found = _settings(config).get("quant_method")
    return None if found is None else str(getattr(found, "value", found))


def unpacked_weights(path: Path | str, config: PretrainedConfig, device: torch.device | str) -> UnpackedWeights | None:
    """The weights of a quantized checkpoint that no library is to run on this device; None leaves them to Transformers.

    Raises ModelError for a packing that is neither ours nor an installed library's.
    """
    method = quantization_method(config)
    if method is None:
        return None
    needed = LIBRARIES.get(method)
    if needed is not None and not str(device).startswith("cpu") and all(find_spec(name) is not None for name in needed):
        return None
    packing = _packing(method, _settings(config))
    return None if packing is None else UnpackedWeights(Path(path), packing)


def _packing(method: str, settings: Mapping[str, Any]) -> Packing | None:
    match method:
        case "gptq":
            return _gptq(str(settings.get("checkpoint_format", "gptq")), settings)
        case "awq":
            return _awq(str(settings.get("version", "gemm")).lower())
        case "auto-round":
            return _auto_round(settings)
        case "compressed-tensors":
            return _compressed(settings)
        case _:
            return None


def _gptq(form: str, settings: Mapping[str, Any]) -> Packing:
    if form not in ("gptq", "gptq_v2"):
        raise ModelError(f"GPTQ weights in the format {form} are not unpacked; save them as gptq or gptq_v2")
    return Gptq(int(settings.get("group_size", -1)), zero_offset=int(form == "gptq"))


def _awq(version: str) -> Packing:
    if version not in ("gemm", "awqversion.gemm"):
        raise ModelError(f"AWQ weights of the version {version} are not unpacked; save them as gemm")
    return Awq()


def _auto_round(settings: Mapping[str, Any]) -> Packing:
    """`packing_format` is "auto_round:auto_gptq" and the like; GPTQ's second format where it names neither."""
    form = str(settings.get("packing_format") or settings.get("backend") or "auto_round:auto_gptq")
    if "awq" in form:
        return Awq()
    if settings.get("data_type", "int") != "int":
        kind = settings["data_type"]
        raise ModelError(f"AutoRound weights of the type {kind} are not unpacked; save them as auto_gptq or auto_awq")
    return _gptq("gptq" if "gptq" in form and "gptqmodel" not in form else "gptq_v2", settings)


def _compressed(settings: Mapping[str, Any]) -> Packing | None:
    groups = settings.get("config_groups") or {}
    used = {str(group.get("format") or settings.get("format")) for group in groups.values()}
    if used <= set(COMPRESSED_FORMATS):
        block = next((found for group in groups.values() if (found := group["weights"].get("block_structure"))), None)
        return Compressed(None if block is None else (int(block[0]), int(block[1])))
    if find_spec("compressed_tensors") is None:
        form = ", ".join(sorted(used))
        raise ModelError(f"weights in the format {form} need compressed-tensors; pip install paceline[quantization]")
    return None


def _settings(config: PretrainedConfig) -> dict[str, Any]:
    found = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else dict(found.to_dict())


class UnpackedWeights(Mapping[str, "torch.Tensor"]):
    """A folder's weights by their names in the model. Each is read, and unpacked to float32 if it is packed, when it is
    asked for. Raises ModelError if the files are not readable, or packed in another way."""

    def __init__(self, path: Path, packing: Packing) -> None:
        self._path, self._packing = path, packing
        self._aliases: dict[str, str] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._aliases.get(name, name)
        parts = self._names[stored]
        if not parts:
            return self._read(stored)
        return self._packing.unpack({part.rpartition(".")[2]: self._read(part) for part in parts})

    def alias(self, name: str, stored: str) -> None:
        """Another name for what is stored once."""
        self._names[name] = self._names[stored]
        self._aliases[name] = stored

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._aliases.get(name, name)
        parts = self._names[stored]
        if not parts:
            return self._stored_shape(stored)
        shapes = {part.rpartition(".")[2]: self._stored_shape(part) for part in parts}
        small = {part.rpartition(".")[2]: self._read(part) for part in parts if part.endswith(".weight_shape")}
        return self._packing.shape(shapes, small)

    @cached_property
    def _names(self) -> dict[str, tuple[str, ...]]:
        """Each weight's name, and the stored tensors it is made of if it is packed."""
        packing = self._packing
        layers: dict[str, list[str]] = {}
        for stored in self._files:
            layer, _, last = stored.rpartition(".")
            if last in packing.parts:
                layers.setdefault(layer, []).append(stored)
        packed = {layer: parts for layer, parts in layers.items() if f"{layer}.{packing.marker}" in parts}
        inside = {part for parts in packed.values() for part in parts}
        plain: dict[str, tuple[str, ...]] = {stored: () for stored in self._files if stored not in inside}
        return plain | {f"{layer}.weight": tuple(parts) for layer, parts in packed.items()}

    @cached_property
    def _files(self) -> dict[str, Any]:
        """The opened file of each stored tensor."""
        from safetensors import SafetensorError, safe_open

        found: dict[str, Any] = {}
        try:
            for file in weight_files(self._path):
                opened: Any = safe_open(file, framework="pt")
                found |= dict.fromkeys(opened.keys(), opened)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{self._path}: cannot read the quantized weights: {reason}") from None
        return found

    def _read(self, stored: str) -> torch.Tensor:
        found: torch.Tensor = self._files[stored].get_tensor(stored)
        return found

    def _stored_shape(self, stored: str) -> tuple[int, ...]:
        return tuple(self._files[stored].get_slice(stored).get_shape())
