"""A draft's folder: what `paceline distill` writes and `load_model` reads.

    config.json           a Llama over the tokens kept
    model.safetensors     int8 `NAME.q` and fp16 `NAME.scale` for matrices, else fp32; `tokens.kept`, `tokens.nearest`
    tokenizer.json.xz     the target's, by which grammars are compiled; a draft without it drafts none of their texts
    paceline_draft.json   whose draft it is, the tokenizer's fingerprint, measured figures, the command that made it
    README.md             the model card

The draft knows a part of its target's vocabulary. `tokens.kept` [K] are the target's ids of the tokens it can draw,
ascending; `tokens.nearest` [vocab] says for each of the target's ids which of the K it reads instead. A draft exchanges
ids with its target, and the fingerprint proves that they mean the same.

A matrix is stored in groups of 32 consecutive inputs, w = scale * q with max|q| = 127 (GGML's Q8_0).
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FILE = "paceline_draft.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json.xz"
FORMAT = 1
GROUP = 32
SHIPPED = "-draft"
KEPT, NEAREST = "tokens.kept", "tokens.nearest"


@dataclass(frozen=True, slots=True)
class DraftCard:
    """What is known of a draft. `figures` are those of its card, by name."""

    target: str
    fingerprint: str
    vocab_size: int
    command: str = ""
    seed: int = 0
    figures: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT


def shipped(name: str) -> Path | None:
    """The folder of a draft that comes with the package: `smollm2-135m-draft` is the one for smollm2-135m."""
    folder = Path(__file__).resolve().parents[1] / "drafts" / name.removesuffix(SHIPPED)
    return folder if name.endswith(SHIPPED) and is_draft(folder) else None


def is_draft(path: Path | str) -> bool:
    """Whether a folder holds a draft with a vocabulary of its own."""
    return (Path(path) / FILE).is_file()


def read_card(path: Path | str) -> DraftCard:
    """Raises ModelError if it is not readable or of another format."""
    file = Path(path) / FILE
    try:
        card = DraftCard(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{file}: not a draft's card: {' '.join(str(error).split())[:200]}") from None
    if card.format != FORMAT:
        raise ModelError(f"{file}: format {card.format}, this version reads {FORMAT}; make the draft again")
    return card


def write_draft(
    path: Path,
    model: PreTrainedModel,
    kept: torch.Tensor,
    nearest: torch.Tensor,
    card: DraftCard,
    readme: str,
    tokenizer: str | None = None,
) -> None:
    """Fill an existing folder; `tokenizer` is the text of the target's tokenizer.json. The card comes last: without it
    the folder is no draft."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {KEPT: kept.cpu().int(), NEAREST: nearest.cpu().int()}
    tied = bool(model.config.tie_word_embeddings)
    for name, weight in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        weight = weight.detach().cpu().float()
        if weight.dim() == 2 and weight.shape[1] % GROUP == 0:
            tensors[f"{name}.q"], tensors[f"{name}.scale"] = quantize(weight)
        else:
            tensors[name] = weight.contiguous()
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    model.config.save_pretrained(path)
    if tokenizer is not None:
        write_tokenizer(path, tokenizer)
    (path / "README.md").write_text(readme, encoding="utf-8")
    (path / FILE).write_text(json.dumps(asdict(card), indent=2) + "\n", encoding="utf-8")


def load_draft(path: Path | str, *, dtype: torch.dtype | str, device: torch.device | str) -> PreTrainedModel:
    """The model over the tokens kept, in eval mode. "auto" is float16. Raises ModelError."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    weights = draft_weights(path)
    config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights.get("model.embed_tokens.weight", torch.empty(0))
    missing = model.load_state_dict(weights, strict=False, assign=True).missing_keys
    if missing:
        raise ModelError(f"{path}: {len(missing)} weights missing ({missing[0]}); make the draft again")
    model.tie_weights()
    _restore_buffers(model, config)
    model = model.to(device=device, dtype=torch.float16 if dtype == "auto" else dtype)
    return model.eval().requires_grad_(False)


def draft_weights(path: Path | str) -> dict[str, torch.Tensor]:
    """The weights by their names in the model, float32. Raises ModelError."""
    tensors = _tensors(path)
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith((".q", ".scale"))}
    for name in [name for name in tensors if name.endswith(".q")]:
        whole = name.removesuffix(".q")
        weights[whole] = dequantize(tensors[name], tensors[f"{whole}.scale"])
    return weights


def load_tokens(path: Path | str) -> tuple[torch.Tensor, torch.Tensor]:
    """The target's ids kept, int64 [K], and for each of its ids the one read instead, int64 [vocab]."""
    tensors = _tensors(path, (KEPT, NEAREST))
    return tensors[KEPT].long(), tensors[NEAREST].long()


def write_tokenizer(path: Path, text: str) -> None:
    """Into a draft's folder, packed."""
    compact = json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))
    (path / TOKENIZER).write_bytes(lzma.compress(compact.encode(), preset=9 | lzma.PRESET_EXTREME))


def load_tokenizer_text(path: Path | str) -> str | None:
    """The target's tokenizer.json, None if the draft came without it. Raises ModelError."""
    file = Path(path) / TOKENIZER
    if not file.is_file():
        return None
    try:
        return lzma.decompress(file.read_bytes()).decode()
    except (OSError, lzma.LZMAError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {error}; make the draft again") from None


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [out, in] and fp16 scales [out, in / 32]."""
    import torch

    groups = weight.float().reshape(weight.shape[0], -1, GROUP)
    scale = (groups.abs().amax(dim=-1) / 127.0).half()
    safe = scale.float().clamp(min=torch.finfo(torch.float16).tiny)
    q = (groups / safe[..., None]).round().clamp(-127, 127).to(torch.int8)
    return q.reshape(weight.shape).contiguous(), scale.contiguous()


def dequantize(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [out, in], on the grid exactly."""
    groups = q.float().reshape(q.shape[0], -1, GROUP) * scale.float()[..., None]
    return groups.reshape(q.shape)


def _restore_buffers(model: PreTrainedModel, config: Any) -> None:
    """Buffers outside the checkpoint (the rotary frequencies) are computed, not read: made anew off the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    stale = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if not stale:
        return
    small = type(config)(**(config.to_dict() | {"vocab_size": 1, "num_hidden_layers": 1}))
    fresh = dict(AutoModelForCausalLM.from_config(small, dtype=torch.float32).named_buffers())
    for name in stale:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, fresh[name])


def _tensors(path: Path | str, names: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Those of these names, all if none is given."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(Path(path) / WEIGHTS, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names or file.keys()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot read {WEIGHTS}: {' '.join(str(error).split())[:200]}") from None
