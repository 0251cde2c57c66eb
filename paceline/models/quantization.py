"""Rounding weights as the field's libraries do it: what `engine.quantization` asks for, as Transformers takes it.

The libraries are optional and differ by device; what does not run is refused before any weight is read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from paceline.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from paceline.config import EngineSettings

EXTRAS = {"bitsandbytes": "gpu", "torchao": "quantization"}
FP8_CAPABILITY = (8, 9)
INT4_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class LibraryQuantization:
    """A library's way to round weights. Made by `library_quantization`."""

    settings: EngineSettings

    @property
    def name(self) -> str:
        """What linear layers run with, for people."""
        settings = self.settings
        library, bits = settings.quantization.split("_")
        if settings.quantization == "bitsandbytes_4bit":
            double = ", double quantization" if settings.bnb_4bit_use_double_quant else ""
            return f"{library} {bits} ({settings.bnb_4bit_quant_type}{double})"
        return f"{library} {bits}"

    def config(self, dtype: torch.dtype) -> Any:
        """Transformers' `quantization_config` for activations of `dtype`. Raises ConfigError if it takes no such."""
        return _CONFIGS[self.settings.quantization](self.settings, dtype)


def library_quantization(settings: EngineSettings, device: torch.device) -> LibraryQuantization | None:
    """What the settings ask for, None if nothing. Raises ConfigError where it does not run."""
    if settings.quantization == "none":
        return None
    library = settings.quantization.partition("_")[0]
    if find_spec(library) is None:
        raise _refusal(settings, f"needs {library}, which is not installed; pip install paceline[{EXTRAS[library]}]")
    if library == "torchao":
        _check_torchao(settings, device)
    else:
        _check_bitsandbytes(settings, device)
    return LibraryQuantization(settings)


def runs_in_library(model: PreTrainedModel) -> bool:
    """Whether a library's modules are in place of its linear layers: loaded so, or from a checkpoint that was."""
    return getattr(model, "hf_quantizer", None) is not None


def round_linears(model: PreTrainedModel, quantization: LibraryQuantization) -> None:
    """Round the linear layers of a loaded model where they are, all but the output head, as Transformers does while it
    loads one: what it cannot load whole is rounded after. Of hooks on them none is left."""
    from transformers.quantizers import AutoHfQuantizer

    config = quantization.config(model.dtype)
    if quantization.settings.quantization.startswith("torchao"):
        _round_by_torchao(model, config)
    else:
        _round_by_bitsandbytes(model, config)
    model.hf_quantizer = AutoHfQuantizer.from_config(config)


def _round_by_torchao(model: PreTrainedModel, config: Any) -> None:
    from torch import nn
    from torchao.quantization import quantize_

    head = model.get_output_embeddings()
    quantize_(model, config.quant_type, filter_fn=lambda module, _: type(module) is nn.Linear and module is not head)


def _round_by_bitsandbytes(model: PreTrainedModel, config: Any) -> None:
    from torch import nn
    from transformers.integrations import replace_with_bnb_linear

    head = model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules() if type(module) is nn.Linear}
    linears = {name: module for module, name in names.items() if module is not head}
    replace_with_bnb_linear(model, [names[head]], config)
    for name in list(linears):
        linear, rounded = linears.pop(name), model.get_submodule(name)
        how = {key: value for key, value in rounded.weight.__dict__.items() if key != "SCB"}
        device, kind = linear.weight.device, type(rounded.weight)
        # It rounds as it moves: 8 bits from the CPU only.
        weight = linear.weight.data.cpu() if config.load_in_8bit else linear.weight.data
        rounded.weight = kind(weight, requires_grad=False, **how).to(device)
        rounded.bias = linear.bias


def _check_bitsandbytes(settings: EngineSettings, device: torch.device) -> None:
    import bitsandbytes

    if device.type not in getattr(bitsandbytes, "supported_torch_devices", {"cuda"}):
        version = bitsandbytes.__version__
        raise _refusal(settings, f"needs a bitsandbytes for {device.type}, which {version} is not; install a later one")


def _check_torchao(settings: EngineSettings, device: torch.device) -> None:
    import torch

    needed = {"torchao_fp8": FP8_CAPABILITY, "torchao_int4": INT4_CAPABILITY}.get(settings.quantization)
    if needed is None:
        return
    if device.type != "cuda":
        instead = "int4" if settings.quantization == "torchao_int4" else "int8"
        raise _refusal(settings, f"needs a GPU; on a CPU use engine.weight_dtype: {instead}")
    if torch.cuda.get_device_capability(device) < needed:
        raise _refusal(settings, "needs a GPU of compute capability {}.{} or later".format(*needed))


def _bitsandbytes_8bit(_: EngineSettings, __: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    # It says at every product that activations are not float16: hundreds of lines a token.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(load_in_8bit=True)


def _bitsandbytes_4bit(settings: EngineSettings, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
    )


def _torchao_int8(_: EngineSettings, __: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))


def _torchao_int4(settings: EngineSettings, dtype: torch.dtype) -> Any:
    """In the layout of the product PyTorch itself has; torchao's own default needs one more library."""
    from torchao.quantization import Int4WeightOnlyConfig
    from transformers import TorchAoConfig

    _require_bfloat16(settings, dtype)
    return TorchAoConfig(
        Int4WeightOnlyConfig(
            group_size=settings.group_size, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    )


def _torchao_fp8(settings: EngineSettings, dtype: torch.dtype) -> Any:
    """With a scale for each row of activations: with one for all of them, rows would change each other's results."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow
    from transformers import TorchAoConfig

    _require_bfloat16(settings, dtype)
    return TorchAoConfig(Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False))


_CONFIGS: dict[str, Callable[[EngineSettings, torch.dtype], Any]] = {
    "bitsandbytes_8bit": _bitsandbytes_8bit,
    "bitsandbytes_4bit": _bitsandbytes_4bit,
    "torchao_int8": _torchao_int8,
    "torchao_int4": _torchao_int4,
    "torchao_fp8": _torchao_fp8,
}


def _require_bfloat16(settings: EngineSettings, dtype: torch.dtype) -> None:
    import torch

    if dtype != torch.bfloat16:
        raise _refusal(settings, f"multiplies bfloat16, not {str(dtype).removeprefix('torch.')}; set engine.dtype")


def _refusal(settings: EngineSettings, why: str) -> ConfigError:
    return ConfigError(f"engine.quantization: {settings.quantization} {why}", param="engine.quantization")
