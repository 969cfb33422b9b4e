"""Two ends that say whatever they may, over a link that takes its time, never disagree."""

from __future__ import annotations

import random
from collections import Counter

from privatelora.errors import LocalProtocolError
from privatelora.runtime.wire.messages import (
    BackwardBegin,
    BackwardEnd,
    CloseSession,
    DropStep,
    ErrorCode,
    ErrorReply,
    ExchangeRequest,
    GradientRequest,
    Hello,
    Message,
    OpenSession,
    Ping,
    Pong,
    SessionClosed,
    SessionOpened,
    StepEnd,
)
from privatelora.runtime.wire.prelude import TYPES, WireLimits
from privatelora.runtime.wire.rules import Phase, SessionPhase
from privatelora.runtime.wire.state import WireConnection
from tests.wire.ends import (
    Ends,
    answer_back,
    ask_back,
    begin,
    drop,
    end,
    end_back,
    go_back,
    greeted,
    reply,
    request,
    train,
)

LIMITS = WireLimits(max_sessions=3, max_steps=3)
TRAINING = (SessionPhase.OPENING_TRAINING, SessionPhase.TRAINING)
NUM_WALKS, NUM_ACTIONS = 250, 500


class Walk:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        # In every other walk sessions last: a training step takes many messages.
        self.num_last_words = 0.05 if seed % 2 else 1.0
        self.ends: Ends = greeted(LIMITS)
        self.said: Counter[str] = Counter()
        self.late: Counter[str] = Counter()
        self.open_at_edge: set[int] = set()
        self.asked_at_edge: list[ExchangeRequest | GradientRequest] = []
        self.kept_at_edge: set[tuple[int, int]] = set()
        self.on_way_back_at_edge: set[tuple[int, int]] = set()
        self.on_way_back_at_cloud: set[tuple[int, int]] = set()
        self.pings_at_cloud: list[int] = []
        self.next_id = 0
        self.goodbyes = 0

    def run(self) -> None:
        for _ in range(NUM_ACTIONS):
            action = self.rng.choice(
                [self.edge_speaks, self.cloud_speaks, self.edge_listens, self.cloud_listens]
            )
            action()
        # Some walks end in the middle of everything.
        goodbye = ErrorReply(ErrorCode.INTERNAL, "no more")
        self.goodbyes = self.rng.randrange(4)
        if self.goodbyes & 1:
            self.ends.edge_says(goodbye)
        if self.goodbyes & 2:
            self.ends.cloud_says(goodbye)
        while self.ends.to_edge or self.ends.to_cloud:
            self.edge_listens()
            self.cloud_listens()

    def session_id(self, end_of: WireConnection) -> int:
        known = list(end_of.sessions)
        if known and self.rng.random() < 0.95:
            return self.rng.choice(known)
        return self.rng.randrange(self.next_id + 2)

    def step_id(self, end_of: WireConnection, session_id: int) -> int:
        steps = end_of.steps(session_id)
        if steps and self.rng.random() < 0.9:
            return self.rng.choice(steps)
        return self.rng.randrange(self.next_id + 2)

    def edge_speaks(self) -> None:
        edge, rng = self.ends.edge, self.rng
        session_id = self.session_id(edge)
        self.next_id = max(0, self.next_id + rng.randint(-1, 3))
        trains = edge.sessions.get(session_id) in TRAINING or rng.random() < 0.05
        message: Message
        last = self.num_last_words
        match rng.choices(range(8), [1, 3, 8, 0.6 * last, 0.3, 0.5 * last, 3, 1])[0]:
            case 0:
                trains = rng.random() < 0.75
                message = OpenSession(self.next_id, 64, "fp16", "fp16", training=trains)
            case 1 if trains:
                message = train(self.next_id, session_id, backward=rng.random() < 0.8)
            case 1:
                message = begin(self.next_id, session_id)
            case 2 if self.asked_at_edge and rng.random() < 0.9:
                # Sometimes one that was answered before.
                asked = rng.choice(self.asked_at_edge[-4:])
                answer = answer_back if isinstance(asked, GradientRequest) else reply
                message = answer(asked.step_id, asked.point, asked.session_id)
            case 2:
                answer = answer_back if trains and rng.random() < 0.5 else reply
                message = answer(self.step_id(edge, session_id), rng.randrange(20), session_id)
            case 3:
                message = CloseSession(session_id)
            case 4:
                message = Ping(self.next_id)
            case 5:
                message = ErrorReply(ErrorCode.INTERNAL, "failed", session_id)
            case number:
                say = go_back if number == 6 else drop
                step_id = self.step_id(edge, session_id)
                kept = [(a, b) for a, b in sorted(self.kept_at_edge) if b in edge.steps(a)]
                if kept and rng.random() < 0.9:
                    session_id, step_id = rng.choice(kept)
                message = say(step_id, session_id)
        try:
            self.ends.edge_says(message)
        except LocalProtocolError:
            return
        self.said[type(message).__name__] += 1
        if isinstance(message, OpenSession):
            self.open_at_edge.add(message.session_id)
        if isinstance(message, BackwardBegin | DropStep):
            # Only of what the cloud keeps, once.
            self.kept_at_edge.remove((message.session_id, message.step_id))
        if isinstance(message, BackwardBegin):
            self.on_way_back_at_edge.add((message.session_id, message.step_id))

    def cloud_speaks(self) -> None:
        cloud, rng = self.ends.cloud, self.rng
        session_id = self.session_id(cloud)
        step_id = self.step_id(cloud, session_id)
        back = (session_id, step_id) in self.on_way_back_at_cloud
        if rng.random() < 0.05:
            back = not back
        message: Message
        match rng.choices(range(6), [4, 8, 4, 2, 1, 0.5 * self.num_last_words])[0]:
            case 0:
                message = SessionOpened(session_id, 64)
            case 1:
                ask = ask_back if back else request
                message = ask(step_id, rng.randrange(20), session_id)
            case 2:
                finish = end_back if back else end
                message = finish(step_id, session_id)
            case 3:
                message = SessionClosed(session_id)
            case 4:
                message = Pong(self.pings_at_cloud[0] if self.pings_at_cloud else 0)
            case _:
                message = ErrorReply(ErrorCode.CAPACITY, "failed", session_id)
        try:
            self.ends.cloud_says(message)
        except LocalProtocolError:
            return
        if isinstance(message, Pong):
            del self.pings_at_cloud[0]
        self.said[type(message).__name__] += 1

    def edge_listens(self) -> None:
        if self.ends.to_edge:
            message = self.ends.edge_hears()
            self.late["edge"] += message is None
            if message is None or isinstance(message, Hello | Ping | Pong):
                return
            if message.session_id is None:
                return
            # Every session ends once for the edge, and nothing of it is heard again.
            assert message.session_id in self.open_at_edge
            if isinstance(message, SessionClosed | ErrorReply):
                self.open_at_edge.remove(message.session_id)
            if isinstance(message, ExchangeRequest | GradientRequest):
                self.asked_at_edge.append(message)
            if isinstance(message, StepEnd) and message.step_id in self.ends.edge.steps(
                message.session_id
            ):
                self.kept_at_edge.add((message.session_id, message.step_id))
            if isinstance(message, GradientRequest | BackwardEnd):
                # Nothing goes back unless the edge said so.
                assert (message.session_id, message.step_id) in self.on_way_back_at_edge
            if isinstance(message, BackwardEnd):
                self.on_way_back_at_edge.remove((message.session_id, message.step_id))

    def cloud_listens(self) -> None:
        if self.ends.to_cloud:
            message = self.ends.cloud_hears()
            self.late["cloud"] += message is None
            if isinstance(message, Ping):
                self.pings_at_cloud.append(message.nonce)
            if isinstance(message, BackwardBegin):
                self.on_way_back_at_cloud.add((message.session_id, message.step_id))


def test_ends_that_keep_to_what_they_may_say_never_disagree() -> None:
    said: Counter[str] = Counter()
    late: Counter[str] = Counter()
    for seed in range(NUM_WALKS):
        walk = Walk(seed)
        try:
            walk.run()
        except Exception as error:
            raise AssertionError(f"walk {seed}: {error}") from error
        edge, cloud = walk.ends.edge, walk.ends.cloud
        assert edge.phase is cloud.phase is (Phase.ENDED if walk.goodbyes else Phase.ACTIVE)
        assert edge.sessions == cloud.sessions
        assert set(edge.sessions) == (set() if walk.goodbyes else walk.open_at_edge)
        for session_id in edge.sessions:
            assert edge.steps(session_id) == cloud.steps(session_id)
        said += walk.said
        late += walk.late
    # The walks went everywhere.
    assert set(said) == {kind.__name__ for kind in TYPES} - {"Hello"}
    assert min(said.values()) > 100
    assert min(late["edge"], late["cloud"]) > 50
