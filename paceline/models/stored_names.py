"""Under which names weights lie in files that were written before a family's modules were renamed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def stored_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """The stored name of each weight of a model that is stored as it is, under its own name or under another by which
    Transformers knows it; what Transformers would convert is left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if not isinstance(one, WeightRenaming)]
    wanted, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for name in stored:
        own, converted = rename_source_key(name, renamings, converters, prefix, wanted)
        if own not in wanted and name in wanted:
            own, converted = name, None
        if own in wanted and converted is None:
            found[own] = name
    return found
