"""Why no node takes a pod: what it asks for, beside what the nodes have. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from paceline.k8s.kinds import Obj, labels_of, name_of

SUFFIXES = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "": Decimal(1),
    **{unit: Decimal(1000) ** power for power, unit in enumerate("kMGTPE", start=1)},
    **{f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", start=1)},
}


def placing(pod: Obj, nodes: Sequence[Obj] | None) -> tuple[str, str]:
    """What keeps a pod from every node, and what to do. Without nodes, what it asks for is all that is known."""
    asked = requests(pod)
    accelerators = {name: amount for name, amount in asked.items() if "/" in name}
    asks = ", ".join(f"{name} {amount:f}" for name, amount in (accelerators or asked).items())
    if nodes is None:
        return f"it asks for {asks}" if asks else "", "add a node that has it, or ask for less in the group's resources"
    if not nodes:
        return "the cluster has no node", "add nodes"
    unmet = [*_lacking(asked, nodes), *_unlabelled(pod, nodes), *_repelled(pod, nodes)]
    if not unmet:
        return "nodes that could take it are full", "add a node, or lower the group's replicas or resources"
    return "; ".join(what for what, _ in unmet), "; ".join(dict.fromkeys(remedy for _, remedy in unmet))


def _lacking(asked: Mapping[str, Decimal], nodes: Sequence[Obj]) -> Iterator[tuple[str, str]]:
    """Resources of which no node has as much as is asked for."""
    for name, amount in asked.items():
        largest = max(quantity((_status(node).get("allocatable") or {}).get(name, "0")) for node in nodes)
        if largest >= amount:
            continue
        if largest == 0 and "/" in name:
            remedy = f"add a node with {name}, or install its device plugin where the hardware is there"
            yield f"no node offers {name}, it asks for {amount:f}", remedy
        else:
            remedy = f"add a larger node, or ask for less {name}"
            yield f"it asks for {name} {_readable(amount)}, the largest node has {_readable(largest)}", remedy


def _unlabelled(pod: Obj, nodes: Sequence[Obj]) -> Iterator[tuple[str, str]]:
    """Labels of its node selector that no node has."""
    for key, value in (pod["spec"].get("nodeSelector") or {}).items():
        have = {labels_of(node).get(key) for node in nodes}
        if value not in have:
            others = ", ".join(sorted(each for each in have if each is not None))
            there = f" (there is {others})" if others else ""
            yield (
                f"no node has label {key}={value}{there}",
                f"label one: kubectl label node NAME {key}={value}, or change the group's nodeSelector",
            )


def _repelled(pod: Obj, nodes: Sequence[Obj]) -> Iterator[tuple[str, str]]:
    """Taints, where every node that its selector allows has one that is not tolerated."""
    wanted = pod["spec"].get("nodeSelector") or {}
    allowed = [node for node in nodes if wanted.items() <= labels_of(node).items()]
    repelling = {name_of(node): [taint for taint in _taints(node) if not _tolerated(pod, taint)] for node in allowed}
    if not allowed or not all(repelling.values()):
        return
    if all(any(taint["key"] == "node.kubernetes.io/unschedulable" for taint in each) for each in repelling.values()):
        yield "every node it may go to is cordoned", "kubectl uncordon NODE"
        return
    taints = dict.fromkeys(_written(taint) for each in repelling.values() for taint in each)
    yield f"it does not tolerate {', '.join(taints)}", "add it to the group's tolerations, or remove the taint"


def _taints(node: Obj) -> list[Mapping[str, Any]]:
    return [each for each in node["spec"].get("taints") or () if each.get("effect") in ("NoSchedule", "NoExecute")]


def _tolerated(pod: Obj, taint: Mapping[str, Any]) -> bool:
    return any(
        each.get("key") in (None, "", taint["key"])
        and each.get("effect") in (None, "", taint["effect"])
        and (each.get("operator") == "Exists" or (each.get("value") or "") == (taint.get("value") or ""))
        for each in pod["spec"].get("tolerations") or ()
    )


def _written(taint: Mapping[str, Any]) -> str:
    value = f"={taint['value']}" if taint.get("value") else ""
    return f"taint {taint['key']}{value}:{taint['effect']}"


def requests(pod: Obj) -> dict[str, Decimal]:
    """What its containers ask for together; a limit asks for as much where nothing else is said."""
    total: dict[str, Decimal] = {}
    for container in pod["spec"].get("containers") or ():
        resources = container.get("resources") or {}
        asked = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
        for name, amount in asked.items():
            total[name] = total.get(name, Decimal(0)) + quantity(str(amount))
    return total


def quantity(text: object) -> Decimal:
    """A quantity of Kubernetes as a number: `500m`, `16Gi`, `1e3`. 0 for what is none."""
    text = str(text)
    digits = text.rstrip("numkMGTPEi") if text[-1:] not in "0123456789." else text
    try:
        return Decimal(digits) * SUFFIXES[text[len(digits) :]]
    except (InvalidOperation, KeyError):
        return Decimal(0)


def _readable(amount: Decimal) -> str:
    """In GiB where it is memory."""
    return f"{amount / 1024**3:.1f}Gi" if amount >= 1024**2 else f"{amount.normalize():f}"


def _status(node: Obj) -> Mapping[str, Any]:
    return node.get("status") or {}
