"""Every rank but 0: loads its share, then executes what rank 0 sends until rank 0 is done, or gone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from paceline.config import EngineSettings
from paceline.engine.tp import channel, plan
from paceline.engine.tp.channel import Channel
from paceline.engine.tp.group import Meeting
from paceline.engine.tp.leader import FAILED
from paceline.engine.tp.plan import Op, Operation
from paceline.engine.tp.share import Share
from paceline.errors import PacelineError

logger = logging.getLogger(__name__)


def follow(path: Path, settings: EngineSettings, meeting: Meeting, rank: int) -> None:
    """Load that rank's share of the model in a folder and do as rank 0 says, for as long as it lives.

    Returns when rank 0 has closed its end. Raises whatever ends it earlier, which rank 0 is told.
    """
    from paceline.engine.load import load_follower

    said = channel.connect(meeting.host, meeting.plan_port, bytes.fromhex(meeting.key), rank)
    try:
        share, ready = load_follower(path, settings, meeting, rank)
        said.send(plan.packed(asdict(ready)))
        execute(said, share)
    except PacelineError as error:
        _last_word(said, error.message)
        raise
    except BaseException as error:
        logger.exception("rank %d failed", rank)
        _last_word(said, f"{type(error).__name__}: {error}")
        raise
    finally:
        said.close()


def execute(said: Channel, share: Share) -> None:
    """What rank 0 says, until it has no more to say."""
    while (data := said.receive()) is not None:
        operations: Sequence[Operation] = plan.unpacked(data)
        result = share.do(operations)
        name, *arguments = operations[-1]
        if name == Op.SCATTER:
            _take(said, share, *arguments)
        elif name == Op.GATHER:
            assert isinstance(result, tuple)
            said.send(*plan.tensors_said([each.cpu().contiguous() for each in result]))


def _take(said: Channel, share: Share, entry: int, start: int, end: int) -> None:
    frames = [said.receive() for _ in range(1 + len(share.entries[entry].tensors))]
    if any(frame is None for frame in frames):
        return
    tensors = plan.tensors_heard([frame for frame in frames if frame is not None])
    assert tensors[0].shape[2] == end - start
    share.put(entry, start, tensors)


def _last_word(said: Channel, why: str) -> None:
    try:
        said.send(FAILED + " ".join(why.split()).encode())
    except OSError:
        return
