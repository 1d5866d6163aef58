"""Who of a phase gets the next request: smooth weighted round robin, as ``cluster.routing`` does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Routed(Protocol):
    """One of a phase's workers or servers.

    Attributes:
        weight: its share of requests relative to the others.
        turn: the least is next.
    """

    weight: float
    turn: float


Member = TypeVar("Member", bound=Routed)


def next_of(able: Sequence[Member]) -> Member:
    """Who gets the next request, of equals the first; its turn moves on."""
    chosen = min(able, key=lambda member: member.turn)
    chosen.turn += 1.0 / chosen.weight
    return chosen


def start_level(member: Routed, others: Sequence[Routed]) -> None:
    """Who takes requests from now on starts level with the least served."""
    member.turn = min((other.turn for other in others), default=member.turn)
