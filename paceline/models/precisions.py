"""Every way to store a model's weights, what it makes of a linear layer, and the settings that ask for it.

The bytes are those of the libraries: bitsandbytes 0.50 (`functional.quantize_4bit`, `int8_vectorwise_quant`), torchao
0.18 (`Int8Tensor`), FBGEMM's packed half precision, and our own packed weights (paceline/engine/linear.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from paceline.errors import ConfigError

Device = Literal["cuda", "cpu"]
DEVICES: Mapping[Device, str] = {"cuda": "GPU", "cpu": "CPU"}
FLOAT32, HALF = 4, 2
BLOCK, OUTER_BLOCK = 64, 256
"""bitsandbytes' 4 bits: weights that share a scale, and scales that share one in turn if they are quantized, too."""
NF4_LEVELS, DYNAMIC_LEVELS = 16, 256
"""Numbers of the tables it keeps beside every weight."""
GROUP, PANEL = 32, 16
"""Ours: inputs with scales of their own, outputs side by side. A scale of 128 inputs is stored four times."""
PACKED = ("int8", "int4")
FBGEMM_TILE = 512
"""Inputs a packed half-precision weight is filled up to a multiple of."""


def _plain(outputs: int, inputs: int, itemsize: int) -> int:
    return outputs * inputs * itemsize


def _row_int8(outputs: int, inputs: int, _: int) -> int:
    """A byte a weight and a float32 scale a row: LLM.int8 (2208.07339), and torchao's int8."""
    return outputs * inputs + outputs * FLOAT32


def _nf4(outputs: int, inputs: int, _: int) -> int:
    """Half a byte a weight and a float32 scale for 64 (2305.14314)."""
    blocks = _ceil(outputs * inputs, BLOCK)
    return _ceil(outputs * inputs, 2) + (blocks + NF4_LEVELS) * FLOAT32


def _nf4_double(outputs: int, inputs: int, _: int) -> int:
    """The same with the scales in a byte each, a float32 scale for 256 of them, and their mean."""
    blocks = _ceil(outputs * inputs, BLOCK)
    tables = NF4_LEVELS + DYNAMIC_LEVELS + 1
    return _ceil(outputs * inputs, 2) + blocks + (_ceil(blocks, OUTER_BLOCK) + tables) * FLOAT32


def _packed(bits: int, outputs: int, inputs: int, itemsize: int) -> int:
    """Panels of 16 outputs; a group of 32 inputs has 64 bytes of scales. Other inputs are not packed."""
    if inputs % GROUP:
        return _plain(outputs, inputs, itemsize)
    return _ceil(outputs, PANEL) * (inputs // GROUP) * (64 + PANEL * GROUP * bits // 8)


def _int8(outputs: int, inputs: int, itemsize: int) -> int:
    return _packed(8, outputs, inputs, itemsize)


def _int4(outputs: int, inputs: int, itemsize: int) -> int:
    return _packed(4, outputs, inputs, itemsize)


def _fbgemm(outputs: int, inputs: int, _: int) -> int:
    return outputs * _ceil(inputs, FBGEMM_TILE) * FBGEMM_TILE * HALF


def _ceil(number: int, of: int) -> int:
    """How many pieces of `of` hold `number`."""
    return -(-number // of)


MATRIX: Mapping[str, Callable[[int, int, int], int]] = {
    "plain": _plain,
    "row_int8": _row_int8,
    "nf4": _nf4,
    "nf4_double": _nf4_double,
    "int8": _int8,
    "int4": _int4,
    "fbgemm": _fbgemm,
}
"""Bytes of one weight [outputs, inputs] by the form it is stored in, and the size of a plain number."""


@dataclass(frozen=True, slots=True)
class Precision:
    """`matrix` is the form of linear layers, `plain` and `activation` the bytes of any other number and of what flows.

    While a product runs it keeps `copies` bytes for every number of its weight, and `sums` for every output: of 4-bit
    weights bitsandbytes makes a copy in 16 bits, and one in float32 beside it where it is left to compute in that.
    `head` is the form of the output head; plain, it may be the embedding itself. `settings` are the EngineSettings
    that ask for it.
    """

    name: str
    device: Device
    matrix: str
    plain: int
    activation: int
    about: str
    copies: int = 0
    sums: int = 0
    head: str = "plain"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        return self.matrix == "plain"

    @property
    def of_library(self) -> bool:
        """Whether a library's modules take the place of linear layers, so that the model's own code runs."""
        return "quantization" in self.settings

    @property
    def shares_head(self) -> bool:
        """Whether our packed products hold the output head, where an embedding tied to it can be looked up."""
        return self.head in PACKED


def _by_libraries(device: Device, plain: int) -> tuple[Precision, ...]:
    """Of bitsandbytes and torchao; the model's own code runs, with `plain` bytes for any other number."""
    return (
        Precision(
            "bnb-8bit",
            device,
            "row_int8",
            plain,
            plain,
            "bitsandbytes LLM.int8",
            sums=FLOAT32,
            settings={"quantization": "bitsandbytes_8bit"},
        ),
        Precision(
            "bnb-4bit",
            device,
            "nf4",
            plain,
            plain,
            "bitsandbytes nf4, a float32 scale for 64 weights",
            copies=plain,
            settings={"quantization": "bitsandbytes_4bit"},
        ),
        Precision(
            "torchao-int8",
            device,
            "row_int8",
            plain,
            plain,
            "torchao's weights of 8 bits",
            copies=plain,
            settings={"quantization": "torchao_int8"},
        ),
    )


PRECISIONS = (
    Precision("fp32", "cuda", "plain", FLOAT32, FLOAT32, "float32", settings={"dtype": "float32"}),
    Precision("bf16", "cuda", "plain", HALF, HALF, "bfloat16 or float16", settings={"dtype": "bfloat16"}),
    *_by_libraries("cuda", HALF),
    # On a CPU bitsandbytes takes the scales out again before the first product.
    Precision(
        "bnb-4bit-dq",
        "cuda",
        "nf4_double",
        HALF,
        HALF,
        "bitsandbytes nf4 with quantized scales (double quantization)",
        copies=HALF,
        settings={"quantization": "bitsandbytes_4bit", "bnb_4bit_use_double_quant": True},
    ),
    Precision("fp32", "cpu", "plain", FLOAT32, FLOAT32, "float32", settings={"linear_backend": "torch"}),
    Precision(
        "fp16",
        "cpu",
        "fbgemm",
        FLOAT32,
        FLOAT32,
        "linear layers in half precision, by FBGEMM",
        head="fbgemm",
        settings={"linear_backend": "fbgemm_fp16"},
    ),
    Precision(
        "int8",
        "cpu",
        "int8",
        FLOAT32,
        FLOAT32,
        "linear layers in 8 bits",
        head="int8",
        settings={"weight_dtype": "int8"},
    ),
    Precision(
        "int4",
        "cpu",
        "int4",
        FLOAT32,
        FLOAT32,
        "linear layers in 4 bits, the head in 8",
        head="int8",
        settings={"weight_dtype": "int4"},
    ),
    *_by_libraries("cpu", FLOAT32),
)
"""In the order they are shown, and the one place where names become settings."""


def precisions(device: Device) -> tuple[Precision, ...]:
    """Those that run on a device."""
    return tuple(each for each in PRECISIONS if each.device == device)


def precision_named(name: str, device: Device) -> Precision:
    """Raises ConfigError, also for one that runs elsewhere."""
    found = {each.name: each for each in precisions(device)}
    if name in found:
        return found[name]
    known = ", ".join(found)
    if any(each.name == name for each in PRECISIONS):
        other = "--memory for a CPU" if device == "cuda" else "--gpu-memory for a GPU"
        raise ConfigError(
            f"precision: {name} does not run on a {DEVICES[device]}, where there are {known}; give {other}",
            param="precision",
        )
    raise ConfigError(f"precision: unknown {name!r}; on a {DEVICES[device]} there are {known}", param="precision")
