"""Load what `resolve` found, with Transformers' own classes: no code from a model's folder, no pickles."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.errors import ConfigError, ModelError, PacelineError
from paceline.models import draft_folder
from paceline.models.prequantized import quantization_method, unpacked_weights
from paceline.models.quantization import LibraryQuantization
from paceline.models.spread import Spread

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, with its chat template if it has one. Raises ModelError."""
    from transformers import AutoTokenizer

    with _readable(path, "tokenizer"):
        return AutoTokenizer.from_pretrained(_folder(path), local_files_only=True, trust_remote_code=False)


def load_config(path: Path | str, *, gguf_file: str | None = None) -> PretrainedConfig:
    """Of a folder its config.json, or what the header of its `gguf_file` says; `path` may also be a file of JSON.

    Raises ModelError, also for architectures that need code of their own.
    """
    from transformers import AutoConfig

    with _readable(path, "config"):
        return AutoConfig.from_pretrained(
            str(path) if Path(path).suffix == ".json" else _folder(path),
            gguf_file=gguf_file,
            local_files_only=True,
            trust_remote_code=False,
        )


def load_causal_lm(
    path: Path | str,
    *,
    dtype: torch.dtype | str,
    device: torch.device | str,
    attn_implementation: str | None = None,
    quantization: LibraryQuantization | None = None,
    spread: Spread | None = None,
) -> PreTrainedModel:
    """The model in `dtype` ("auto" is the checkpoint's) on `device`, in eval mode, without gradients.

    `attn_implementation` is a name in Transformers' AttentionInterface; None is its own choice. `quantization` rounds
    the weights on the way; `spread` puts them on several devices, of which `device` is the first. Raises ModelError,
    also if the files lack a weight: Transformers would fill it with random numbers and go on; and ConfigError if
    `quantization` is of no use for this model.
    """
    if draft_folder.is_draft(path):
        if quantization is not None:
            refuse_rounding_twice(path)
        with _readable(path, "draft"):
            draft = draft_folder.load_draft(path, dtype=dtype, device=device)
            if attn_implementation is not None:
                draft.set_attn_implementation(attn_implementation)
            return draft
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    options |= {"device_map": {"": device}} if spread is None else spread.options()
    with _readable(path, "model"), _no_bars():
        config = load_config(path)
        if quantization is not None:
            refuse_rounding_twice(path)
            options["quantization_config"] = quantization.config(_dtype(config, dtype))
        model, info = _from_pretrained(path, config, device, options)
    if spread is not None:
        spread.belongs_to(model)
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{path}: {len(missing)} weights missing ({missing[0]}); fetch or save the model again")
    return model.eval().requires_grad_(False)


def _from_pretrained(
    path: Path | str, config: PretrainedConfig, device: torch.device | str, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and Transformers' account of its loading."""
    found: tuple[PreTrainedModel, dict[str, Any]]
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    unpacked = unpacked_weights(path, config, device)
    if unpacked is None:
        found = AutoModelForCausalLM.from_pretrained(
            _folder(path),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
        return found
    dtype = options["dtype"] = _dtype(config, options["dtype"])
    weights = {name: weight.to(dtype) if weight.is_floating_point() else weight for name, weight in unpacked.items()}
    plain = copy.deepcopy(config)
    del plain.quantization_config
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    found = kind.from_pretrained(None, config=plain, state_dict=weights, output_loading_info=True, **options)
    return found


def refuse_rounding_twice(path: Path | str) -> None:
    """Raise ConfigError for a model that a library cannot round, since it is rounded already."""
    already = "a distilled draft has 8 bits already"
    if not draft_folder.is_draft(path):
        method = quantization_method(load_config(path))
        if method is None:
            return
        already = f"the checkpoint is quantized already, by {method}; set none"
    raise ConfigError(f"engine.quantization: {already}", param="engine.quantization")


def _dtype(config: PretrainedConfig, dtype: torch.dtype | str) -> torch.dtype:
    """ "auto" is the checkpoint's; half precision if it does not say."""
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(config, "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of the mapping from tokens, added ones included, to ids.

    Equal iff every id means the same token, whatever the chat template: then a draft and a target may
    exchange ids.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def eos_token_ids(
    source: Path | str | PretrainedConfig,
    generation_config: GenerationConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> frozenset[int]:
    """Every id that ends an answer, by any of config, generation config and tokenizer.

    `source` is a model folder or its config; of a folder, generation_config.json counts too if there is one.
    """
    if isinstance(source, Path | str):
        config = load_config(source)
        generation_config = generation_config or _generation_config(source)
    else:
        config = source
    named = (config, config.get_text_config(), generation_config, tokenizer)
    return frozenset(found for owner in named for found in _ids(getattr(owner, "eos_token_id", None)))


def _ids(value: int | Iterable[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else [int(one) for one in value]


def _generation_config(path: Path | str) -> Any:
    from transformers import GenerationConfig

    if not (Path(path) / "generation_config.json").is_file():
        return None
    with _readable(path, "generation config"):
        return GenerationConfig.from_pretrained(_folder(path), local_files_only=True)


def _folder(path: Path | str) -> str:
    """`path` if it is a folder: of anything else Transformers would think it is a Hub id."""
    if not Path(path).is_dir():
        raise ModelError(f"{path}: no such folder")
    return str(path)


@contextmanager
def _readable(path: Path | str, what: str) -> Iterator[None]:
    """What Transformers raises, as one line."""
    try:
        yield
    except PacelineError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in reason:
            reason = "it needs code from its own folder, which is never run; use a model Transformers knows"
        raise ModelError(f"{path}: cannot load the {what}: {reason[:300]}") from error


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without Transformers' progress bars, which would fill a replica's log."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
