"""Validates certificate and private-key files: whether they can be used, and until when."""

from __future__ import annotations

import datetime
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from cryptography import x509

log = logging.getLogger(__name__)

WARN_DAYS = 30


@dataclass(frozen=True, slots=True)
class Validity:
    """When the certificates of one file are valid: all of a chain, and at least one of several CAs."""

    path: str
    begin: datetime.datetime
    end: datetime.datetime

    def trouble(self, now: datetime.datetime) -> str:
        """Why it is not valid now; empty if it is."""
        if now < self.begin:
            return f"tls_dir: {self.path} is not valid before {self.begin:%Y-%m-%d %H:%M} UTC"
        if now > self.end:
            return f"tls_dir: {self.path} has expired on {self.end:%Y-%m-%d %H:%M} UTC"
        return ""


def check_pair(cert_path: str, chain: bytes, key_path: str, key: bytes) -> Validity:
    """When a certificate with its key is valid. ConfigError for files that are neither, or do not belong together."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    certificates = _parse(cert_path, chain)
    try:
        private = load_pem_private_key(key, None)
    except (ValueError, TypeError) as error:  # TypeError: it is encrypted
        raise ConfigError(f"tls_dir: {key_path} is not a private key in PEM without a password") from error
    own, of = (
        one.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        for one in (private.public_key(), certificates[0].public_key())
    )
    if own != of:
        raise ConfigError(f"tls_dir: {key_path} is not the key of the certificate in {cert_path}")
    begin = max(one.not_valid_before_utc for one in certificates)
    return Validity(cert_path, begin, min(one.not_valid_after_utc for one in certificates))


def check_authorities(path: str, pem: bytes) -> Validity:
    """When one of the CAs in a file is valid. ConfigError for a file without certificates."""
    certificates = _parse(path, pem)
    begin = min(one.not_valid_before_utc for one in certificates)
    return Validity(path, begin, max(one.not_valid_after_utc for one in certificates))


def _parse(path: str, pem: bytes) -> list[x509.Certificate]:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigError(f"tls_dir: {path} holds no certificate in PEM") from error


def warn_of_end(validities: tuple[Validity, ...]) -> None:
    """Log what is not valid now, or will not be in `WARN_DAYS` days."""
    now = datetime.datetime.now(datetime.UTC)
    for one in validities:
        if trouble := one.trouble(now):
            log.warning("%s; no secure connection will be made with it", trouble)
        elif one.end - now < datetime.timedelta(days=WARN_DAYS):
            left = (one.end - now).days
            log.warning("tls_dir: %s expires in %d days; `kvstore config cert` makes another", one.path, left)


def require_valid(validities: tuple[Validity, ...]) -> None:
    """ConfigError for what is not valid now."""
    for one in validities:
        if trouble := one.trouble(datetime.datetime.now(datetime.UTC)):
            raise ConfigError(f"{trouble}; `kvstore config cert` makes another")
