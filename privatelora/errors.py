"""The one exception tree.

    PrivateLoRAError
    ├── ConfigError            a configuration file or option is wrong
    ├── PartitionError         a checkpoint, shard, plan or adapter is wrong or does not fit
    ├── RequestError           a generation request cannot be served as asked
    │   └── UnknownModel       it names a model that is not here
    ├── TrainingError          a training run cannot go on; what it had trained is kept
    ├── TransportError         the link between two ends
    │   ├── ConnectError       could not connect or listen
    │   ├── ConnectionClosed   the link ended
    │   └── TransportTimeout   a wait ran past its deadline
    ├── ProtocolError          the conversation on the link
    │   ├── LocalProtocolError     this end tried something illegal: a bug here
    │   ├── RemoteProtocolError    the peer sent something illegal
    │   └── VersionMismatch        the peer speaks another protocol version
    ├── AuthError              the peer is not who it should be
    └── CapacityError          a limit is reached; trying later may work
        ├── SessionEvicted     a session's cache is gone; it can be rebuilt from its text
        └── CloudDraining      the cloud shuts down and lets nobody in any more

A message is for a person: what is wrong, where, and what to do. Exceptions of other
libraries are translated where they enter, with the original as ``__cause__``.
"""


class PrivateLoRAError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(PrivateLoRAError):
    """A configuration file or a command-line option is wrong."""


class PartitionError(PrivateLoRAError):
    """A checkpoint, shard, plan, basis or adapter is damaged, unsupported or does not fit."""


class RequestError(PrivateLoRAError):
    """A generation request cannot be served as asked (for example: the prompt is too long)."""


class TrainingError(PrivateLoRAError):
    """A training run cannot go on; what it had trained until then is kept."""


class UnknownModel(RequestError):
    """A request names a model that this edge does not have."""


class TransportError(PrivateLoRAError):
    """The link between two ends failed."""


class ConnectError(TransportError):
    """A connection could not be opened, or an address could not be listened on."""


class ConnectionClosed(TransportError):
    """The link ended: closed by either end, reset, or aborted."""


class TransportTimeout(TransportError):
    """A wait on the link ran past its deadline."""


class ProtocolError(PrivateLoRAError):
    """The conversation on a link went wrong."""


class LocalProtocolError(ProtocolError):
    """This end tried to send something the protocol does not allow now; a defect here."""


class RemoteProtocolError(ProtocolError):
    """The peer sent bytes or a message the protocol does not allow."""


class VersionMismatch(ProtocolError):
    """The peer speaks a protocol version this end does not."""


class AuthError(PrivateLoRAError):
    """The peer could not prove an identity that is allowed here."""


class CapacityError(PrivateLoRAError):
    """A limit (sessions, cache, memory) is reached; the same request may succeed later.

    ``retry_after_s``: in how many seconds that is worth a try, where that is known.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SessionEvicted(CapacityError):
    """A session's cache was needed elsewhere; open another and send its text again."""


class CloudDraining(CapacityError):
    """The cloud shuts down; it may be back soon, or another in its place."""
