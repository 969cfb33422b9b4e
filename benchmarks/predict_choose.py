"""What could be chosen for a link, what each choice is predicted to give, and which to take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from privatelora.benchmarks.predict import Prediction, predict
from privatelora.benchmarks.predict_terms import Scenario
from privatelora.errors import PrivateLoRAError
from privatelora.partition.plan import Plan
from privatelora.runtime.codecs import Codecs

Every = int | Literal["all"]
EVERYS: Sequence[Every] = (1, 2, 6, 15, "all")
NEAR_ENOUGH = 0.9
"""Of the fastest arrangement's rate, which is not worth grouping more layers for."""
AS_FAST = 0.98
"""Of the fastest codec's rate, or transport's: a difference that nobody notices."""
ONE_MACHINE_RTT_S = 1e-4
"""Below it both ends are taken to be on one machine where nothing else says so."""


@dataclass(frozen=True)
class TransportCost:
    """``round_trip_s``: of a frame of 768 bytes within one machine, the network's own not in it."""

    scheme: str
    round_trip_s: float
    is_encrypted: bool
    within_machine: bool = False


TRANSPORTS = (
    TransportCost("shm://", 6.8e-6, is_encrypted=False, within_machine=True),
    TransportCost("tcp://", 64e-6, is_encrypted=False),
    TransportCost("tls://", 71e-6, is_encrypted=True),
    TransportCost("zmq+tcp:// with CURVE", 107e-6, is_encrypted=True),
)
"""p50 on two cores of an AMD EPYC, README, `privatelora-bench transport`."""


def transport_round_trip_s(scheme: str) -> float:
    """What a transport such as ``tcp`` takes within one machine; 0 where it is not known."""
    known = (one.round_trip_s for one in TRANSPORTS if one.scheme.partition("://")[0] == scheme)
    return next(known, 0.0)


@dataclass(frozen=True)
class Option:
    """One choice. ``label``: of its arrangement, for people."""

    label: str
    plan: Plan
    codec: str
    transport: TransportCost
    prediction: Prediction

    @property
    def tokens_per_s(self) -> float:
        """Of one session."""
        return self.prediction.tokens_per_s

    def as_json(self) -> dict[str, Any]:
        """The choice and its figures."""
        return {
            "arrangement": self.label,
            "every": self.plan.every,
            "codec": self.codec,
            "transport": self.transport.scheme,
            **self.prediction.as_json(),
        }


@dataclass(frozen=True)
class Recommendation:
    """What to take, why, and everything it was compared with."""

    best: Option
    reasons: tuple[str, ...]
    options: tuple[Option, ...]
    """Arrangements and codecs, over the transport that was taken."""
    transports: tuple[Option, ...]
    """The best arrangement and codec over each transport."""

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        return {
            "recommended": self.best.as_json(),
            "reasons": list(self.reasons),
            "options": [option.as_json() for option in self.options],
            "transports": [option.as_json() for option in self.transports],
        }


def label(plan: Plan) -> str:
    """How an arrangement is asked for: what ``privatelora partition`` takes."""
    return f"every {'all' if plan.every >= len(plan.layers) else plan.every}"


def arrangements(make: Callable[[Every], Plan], everys: Iterable[Every] = EVERYS) -> list[Plan]:
    """A plan for each of ``everys`` that the model has the layers for, all different."""
    plans: dict[int, Plan] = {}
    for every in everys:
        plan = make(every)
        if every == "all" or every < len(plan.layers):
            plans.setdefault(plan.every, plan)
    return [plans[every] for every in sorted(plans)]


def regrouped(plan: Plan, every: Every) -> Plan:
    """A plan like ``plan`` with ``every`` adapted layers to a point."""
    number = len(plan.layers) if every == "all" else every
    # Not a copy: what a plan has worked out of itself would be copied along.
    return Plan.model_validate({**plan.model_dump(), "every": number})


def recommend(
    scenario: Scenario,
    plans: Sequence[Plan],
    codecs: Mapping[str, Codecs],
    *,
    is_local: bool | None = None,
) -> Recommendation:
    """Choose for the scenario's link among ``plans`` and ``codecs``, the exactest of these first.

    ``is_local``: both ends are on one machine; None: told by the round trip time. The link's round
    trip is the network's; that of the transport is added.
    """
    if is_local is None:
        is_local = scenario.link.rtt_s <= ONE_MACHINE_RTT_S
    transport = _transport(is_local)

    def option(plan: Plan, codec: str, transport: TransportCost) -> Option:
        link = replace(scenario.link, rtt_s=scenario.link.rtt_s + transport.round_trip_s)
        chosen = replace(scenario, plan=plan, codecs=codecs[codec], link=link)
        return Option(label(plan), plan, codec, transport, predict(chosen))

    options = [option(plan, codec, transport) for plan in plans for codec in codecs]
    if not options:
        raise PrivateLoRAError("there is nothing to choose from")
    fastest = max(options, key=lambda one: one.tokens_per_s)
    of_plan = {
        plan.every: max(
            (one for one in options if one.plan == plan), key=lambda one: one.tokens_per_s
        )
        for plan in plans
    }
    every = min(
        number
        for number, one in of_plan.items()
        if one.tokens_per_s >= NEAR_ENOUGH * fastest.tokens_per_s
    )
    least = AS_FAST * of_plan[every].tokens_per_s
    best = next(one for one in options if one.plan.every == every and one.tokens_per_s >= least)
    others = [one for one in TRANSPORTS if is_local or not one.within_machine]
    return Recommendation(
        best,
        _reasons(best, fastest, of_plan, is_local),
        tuple(options),
        tuple(option(best.plan, best.codec, one) for one in others),
    )


def _transport(is_local: bool) -> TransportCost:
    """The fastest that is fit for the way: over a network only what is encrypted."""
    fit = [one for one in TRANSPORTS if (one.within_machine if is_local else one.is_encrypted)]
    return min(fit, key=lambda one: one.round_trip_s)


def _reasons(
    best: Option, fastest: Option, of_plan: Mapping[int, Option], is_local: bool
) -> tuple[str, ...]:
    token, nbytes = best.prediction.token, best.prediction.nbytes
    parts = {
        "round trips": token.round_trips_s,
        "bytes": token.up_s + token.down_s,
        "computing at both ends": token.total_s - token.round_trips_s - token.up_s - token.down_s,
    }
    most = max(parts, key=parts.__getitem__)
    share = parts[most] / token.total_s
    reasons = [
        f"{best.label}: {_trips(nbytes.round_trips)} a token; {share:.0%} of its "
        f"{token.total_s * 1e3:.3g} ms are {most}"
    ]
    first = of_plan[min(of_plan)]
    if best.plan.every != first.plan.every:
        reasons.append(
            f"{first.label} would make {_trips(first.prediction.nbytes.round_trips)} and "
            f"{first.tokens_per_s:.3g} tokens/s instead of {best.tokens_per_s:.3g}"
        )
    if best.plan.every != fastest.plan.every:
        reasons.append(
            f"grouping more layers gives at most {fastest.tokens_per_s / best.tokens_per_s - 1:.0%}"
            f" more ({fastest.label}): not worth another arrangement"
        )
    reasons.append(
        f"{best.codec}: the exactest codec that is within {1 - AS_FAST:.0%} of the fastest here"
    )
    way = "within one machine" if is_local else "encrypted, for a network"
    reasons.append(f"{best.transport.scheme}: the fastest that is {way}")
    return tuple(reasons)


def _trips(number: int) -> str:
    return f"{number} round trip{'s' if number > 1 else ''}"
