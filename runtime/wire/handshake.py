"""Whether the two ends of a connection belong together, and what they agree on."""

from __future__ import annotations

from dataclasses import dataclass

from privatelora.errors import PartitionError, RemoteProtocolError
from privatelora.runtime.wire.messages import Hello

_WHAT_TO_DO = {
    "model": "the shards were cut from different models: point both ends at shards of one model",
    "plan": "the shards were cut by different plans: re-create both shards from one plan file",
    "basis": (
        "the shards hold different matrices A and B: re-create both shards from one basis, same "
        "kind and seed"
    ),
}


@dataclass(frozen=True, slots=True)
class Agreement:
    """What follows from two Hellos.

    ``codec``: how this end encodes the tensors it sends, unless asked for another.
    ``max_frame_nbytes``: size that both ends accept.
    """

    codec: str
    max_frame_nbytes: int


def check_hello(ours: Hello, theirs: Hello) -> Agreement:
    """Compare two Hellos, both already decoded, so both of this protocol version.

    Raises PartitionError naming every fingerprint that differs and what to do about it, and
    RemoteProtocolError for two ends of the same role or without a payload codec in common.
    """
    if theirs.role is ours.role:
        raise RemoteProtocolError(
            f"both ends are {ours.role}: connect an edge to a cloud; check the address"
        )
    differing = [
        f"{what} ({ours.role} {mine[:12]}, {theirs.role} {other[:12]}): {_WHAT_TO_DO[what]}"
        for what, mine, other in (
            ("model", ours.fingerprints.model, theirs.fingerprints.model),
            ("plan", ours.fingerprints.plan, theirs.fingerprints.plan),
            ("basis", ours.fingerprints.basis, theirs.fingerprints.basis),
        )
        if mine != other
    ]
    if differing:
        # Read at either end, so "here" would mislead.
        raise PartitionError(f"{ours.role} and {theirs.role} differ in " + "; in ".join(differing))
    codec = next((name for name in ours.codecs if name in theirs.codecs), None)
    if codec is None:
        raise RemoteProtocolError(
            f"no payload codec in common: this end offers {', '.join(ours.codecs) or 'none'}, "
            f"the {theirs.role} {', '.join(theirs.codecs) or 'none'}"
        )
    return Agreement(codec, min(ours.max_frame_nbytes, theirs.max_frame_nbytes))
