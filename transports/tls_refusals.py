"""Why a TLS handshake failed, in words for a person at either end."""

from __future__ import annotations

import ssl
from typing import NamedTuple

_RENEW = "it needs a new one (privatelora keys new), or one of the two clocks is wrong"


class Refusal(NamedTuple):
    """``about_identity``: a certificate is at fault, and not the way the two ends speak.

    ``text``: what "it", the peer, does wrong, or holds against this end.
    """

    about_identity: bool
    text: str


_OLD_VERSION = Refusal(False, "it does not speak TLS 1.3, the only version this end speaks")

NOT_TLS = {
    "HTTP_REQUEST": Refusal(False, "it does not speak TLS"),
    "WRONG_VERSION_NUMBER": Refusal(False, "it does not speak TLS"),
}
"""By OpenSSL's reasons for taking what the peer sent for no TLS at all."""

# X509_V_ERR_* of OpenSSL's x509_vfy.h: what this end found wrong with the peer's certificate.
_VERIFY_CODES = {
    9: f"its certificate is not valid yet; {_RENEW}",
    10: f"its certificate has expired; {_RENEW}",
    62: "its certificate is not for {host}; connect by a name that it holds, or make one for this "
    "name: privatelora keys new NAME --host {host}",
    64: "its certificate is not for {host}; connect by a name that it holds, or make one for this "
    "address: privatelora keys new NAME --host {host}",
}

# RFC 8446, section 6.2: what the peer found wrong, by what follows ALERT_ in OpenSSL's name.
_ALERTS = {
    "CERTIFICATE_REQUIRED": Refusal(
        True,
        "it lets in only peers with a certificate, and this end shows none; set tls: certificate "
        "and key, and put the certificate among those it trusts",
    ),
    "UNKNOWN_CA": Refusal(
        True, "it does not trust this end's certificate; put that among those it trusts"
    ),
    "CERTIFICATE_EXPIRED": Refusal(
        True,
        "it refuses this end's certificate as expired; make a new one (privatelora keys new) and "
        "put that among those it trusts, or correct the clocks",
    ),
    "PROTOCOL_VERSION": _OLD_VERSION,
}
_CERTIFICATE_ALERTS = (
    "ACCESS_DENIED",
    "BAD_CERTIFICATE",
    "CERTIFICATE_REVOKED",
    "CERTIFICATE_UNKNOWN",
    "DECRYPT_ERROR",
    "UNSUPPORTED_CERTIFICATE",
)

_REASONS = {
    **NOT_TLS,
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": Refusal(
        True,
        "it shows no certificate, and this end lets in only those in its tls: trust; give it one "
        "(privatelora keys new) and put the certificate there",
    ),
    "UNSUPPORTED_PROTOCOL": _OLD_VERSION,
}


def explain(error: OSError, host: str = "") -> Refusal:
    """Why the handshake ended with ``error``. ``host``: the name or IP that was dialled."""
    if isinstance(error, ssl.SSLCertVerificationError):
        text = _VERIFY_CODES.get(
            error.verify_code,
            f"its certificate is not trusted here ({error.verify_message.rstrip('.')}); if it is "
            "the right peer, put its certificate into tls: trust",
        )
        return Refusal(True, text.replace("{host}", host))
    if not isinstance(error, ssl.SSLError):
        return Refusal(False, "it ended the connection before TLS was set up")
    reason = error.reason or "unknown reason"
    if reason in _REASONS:
        return _REASONS[reason]
    words = reason.replace("_", " ").lower()
    _, alert, name = reason.rpartition("ALERT_")
    if not alert:
        return Refusal(False, f"the TLS handshake failed ({words})")
    if name in _ALERTS:
        return _ALERTS[name]
    if name in _CERTIFICATE_ALERTS:
        return Refusal(
            True,
            f"it refuses this end's certificate ({name.replace('_', ' ').lower()}); check that "
            "the certificate is valid now and made for the host name that was dialled",
        )
    return Refusal(False, f"it ended the TLS handshake ({words})")
