"""An outside party's word for when the lock existed: a time-stamp token (RFC 3161) over its bytes.

No network is used here. Whoever locks a plan has the request signed by any time-stamp authority and puts the
answer beside the lock, with the authority's root certificate.
"""

from dataclasses import dataclass
from datetime import UTC
from pathlib import Path

from cryptography.x509 import load_der_x509_certificate, load_pem_x509_certificates
from rfc3161_client import (
    HashAlgorithm,
    TimestampRequestBuilder,
    TimeStampResponse,
    VerificationError,
    VerifierBuilder,
    decode_timestamp_response,
)

from gradnoise.base.errors import InputError
from gradnoise.base.files import write_bytes
from gradnoise.registration.lockfile import lock_path


@dataclass(frozen=True)
class Timestamp:
    """Whether a token proves that the lock existed at `utc`, by the word of `authority`; if not, why."""

    verified: bool
    utc: str | None = None
    authority: str | None = None
    reason: str | None = None


def request_path(plan: Path | str) -> Path:
    """Where the request to an authority lies: `plan.lock.tsq`."""
    return lock_path(plan).with_suffix(".tsq")


def token_path(plan: Path | str) -> Path:
    """Where an authority's answer lies: `plan.lock.tsr`."""
    return lock_path(plan).with_suffix(".tsr")


def roots_path(plan: Path | str) -> Path:
    """Where the authority's root certificates lie, and intermediate ones that the answer lacks."""
    return lock_path(plan).with_suffix(".pem")


def write_request(plan: Path | str) -> Path:
    """Write the request for a time stamp over the bytes of the plan's lock; gives its path.

    SHA-256, without nonce, so that the same lock gives the same request; it asks for the signer's
    certificate. Raises `InputError` without a lock.
    """
    if not lock_path(plan).is_file():
        raise InputError(str(lock_path(plan)), "missing", "lock the plan first: gradnoise plan lock")
    builder = TimestampRequestBuilder().data(lock_path(plan).read_bytes())
    request = builder.hash_algorithm(HashAlgorithm.SHA256).nonce(nonce=False).cert_request(cert_request=True)
    write_bytes(request_path(plan), request.build().as_bytes())
    return request_path(plan)


def verify_timestamp(plan: Path | str) -> Timestamp | None:
    """Hold the token beside a plan's lock against the lock's bytes and the roots; None without a token.

    Verified: the authority granted the request; its signature over exactly these bytes holds; its certificate
    is for time stamping, was valid then, and leads to a root in `plan.lock.pem`. Whether that root deserves
    trust is for the reader to say. Anything else, a damaged file included, is not verified and has a reason.
    """
    if not token_path(plan).is_file():
        return None
    for path in (roots_path(plan), lock_path(plan)):
        if not path.is_file():
            return Timestamp(False, reason=f"{path}: missing")
    try:
        roots = load_pem_x509_certificates(roots_path(plan).read_bytes())
    except ValueError:
        return Timestamp(False, reason=f"{roots_path(plan)}: holds no certificates in PEM")
    try:
        token = decode_timestamp_response(token_path(plan).read_bytes())
        VerifierBuilder(roots=list(dict.fromkeys(roots))).build().verify_message(
            token, lock_path(plan).read_bytes()
        )
        made = token.tst_info.gen_time.astimezone(UTC).isoformat(timespec="seconds")
        return Timestamp(True, utc=made, authority=_signer(token))
    except (VerificationError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        return Timestamp(False, reason=f"{token_path(plan)}: {reason}")


def _signer(token: TimeStampResponse) -> str:
    """Name of the certificate that signed, which verification has found among those of the token."""
    (signer,) = token.signed_data.signer_infos
    certificates = [load_der_x509_certificate(der) for der in token.signed_data.certificates]
    named = next(
        c for c in certificates if (c.issuer, c.serial_number) == (signer.issuer, signer.serial_number)
    )
    return named.subject.rfc4514_string()
