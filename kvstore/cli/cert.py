"""`kvstore config cert`: a CA, the certificates that it signs, and tokens, for a daemon that listens on TCP."""

from __future__ import annotations

import datetime
import ipaddress
import re
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

import click
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kvstore.cli.common import common_options, note, print_facts, print_json
from kvstore.config import credentials, default_config_path, parse_address
from kvstore.config.credentials import ADMIN_NAME
from kvstore.config.private_files import require_private_directory, write_private
from kvstore.errors import DirectoryError

CA_NAME = "kvstore CA"
CA_KEY = "ca.key"
DAEMON_NAME = "kvstore-daemon"
WORKER_NAME = "kvstore-worker"
DAYS = 825  # the longest that macOS trusts the certificate of a server
TOKEN_BYTES = 32
CLOCK_SLACK = datetime.timedelta(hours=1)  # of the machines that are to accept what was made just now


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def key_pem(self) -> bytes:
        """The key, PKCS 8, not encrypted."""
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    @property
    def pem(self) -> bytes:
        """The certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def make_ca(days: int) -> Pair:
    """A CA that can sign certificates of ends, and no further CAs."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, CA_NAME)])
    builder = _builder(name, name, key, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    return Pair(builder.sign(key, hashes.SHA256()), key)


def make_pair(ca: Pair, name: str, days: int, hosts: tuple[str, ...] = ()) -> Pair:
    """A pair signed by `ca`: for a server at `hosts` (names or addresses), for a client without any."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = _builder(subject, ca.certificate.subject, key, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key())
    builder = builder.add_extension(issuer, critical=False)
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_san(host) for host in hosts]), critical=False)
    return Pair(builder.sign(ca.key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - CLOCK_SLACK).not_valid_after(now + datetime.timedelta(days=days))
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _san(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:  # then it is a name
        return x509.DNSName(host)


def make_files(hosts: tuple[str, ...], days: int) -> dict[str, bytes]:
    """Generate all files, by relative path: the CA, and one folder each for daemon and worker in `tls_dir` layout."""
    ca = make_ca(days)
    pairs = {
        "daemon": make_pair(ca, DAEMON_NAME, days, hosts),
        "worker": make_pair(ca, WORKER_NAME, days),
        "admin": make_pair(ca, ADMIN_NAME, days),
    }
    tokens = {scope: f"{scope} {secrets.token_urlsafe(TOKEN_BYTES)}\n" for scope in ("worker", "admin")}
    tokens["daemon"] = tokens["worker"] + tokens["admin"]
    files = {credentials.CA: ca.pem, CA_KEY: ca.key_pem}
    for end, pair in pairs.items():
        files |= {
            f"{end}/{credentials.CERT}": pair.pem,
            f"{end}/{credentials.KEY}": pair.key_pem,
            f"{end}/{credentials.CA}": ca.pem,
            f"{end}/{credentials.TOKENS}": tokens[end].encode(),
        }
    return files


def write_files(directory: Path, files: dict[str, bytes], *, force: bool) -> None:
    """All files 0600 in directories of our own; DirectoryError, before anything is written, when one is there."""
    for folder in dict.fromkeys([directory, *((directory / name).parent for name in files)]):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            require_private_directory(folder, "choose another --dir")
        except OSError as error:
            raise DirectoryError(f"cannot make {folder}: {error.strerror}") from error
    taken = sorted(name for name in files if (directory / name).exists() or (directory / name).is_symlink())
    if taken and not force:
        raise DirectoryError(f"{directory} has {', '.join(taken)} already; --force replaces all of them")
    for name in taken:
        (directory / name).unlink()
    for name, data in files.items():
        write_private(directory / name, data)


def _host(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if not re.fullmatch(r"[A-Za-z0-9.-]{1,253}|[0-9a-fA-F:.]+", value):
            raise click.BadParameter(f"{value!r} is neither a host name nor an address")
    return values


@click.command("cert")
@click.option(
    "--host", "hosts", multiple=True, metavar="NAME", callback=_host, help="Name or address that clients use."
)
@click.option("--dir", "directory", metavar="DIR", help="Where to write.  [default: tls beside the configuration file]")
@click.option(
    "--days", type=click.IntRange(1, 3650), default=DAYS, show_default=True, help="How long the certificates are valid."
)
@click.option("--force", is_flag=True, help="Replace existing files. Clients that use the old ones are then refused.")
@common_options
def command(
    address: str | None,
    config_path: str | None,
    as_json: bool,
    hosts: tuple[str, ...],
    directory: str | None,
    days: int,
    force: bool,
) -> None:
    """Make a CA, certificates and tokens for TCP.

    The folders daemon, worker and admin are each a `tls_dir`: cert.pem, key.pem, ca.pem and tokens. Leave daemon/ with
    the daemon and copy worker/ or admin/ to each client; both ends then ask for a certificate of this CA and a token.
    Without ca.pem in daemon/ the daemon asks for tokens alone, without tokens for certificates alone. All files are
    0600 in 0700 directories. Take ca.key off the machine: it can sign more.

    --host may be repeated; without it the certificate is for the host of --address, or this one.
    """
    hosts = hosts or _hosts_of(address)
    beside = Path(config_path) if config_path else default_config_path()
    where = Path(directory or beside.parent / "tls").expanduser().absolute()
    files = make_files(hosts, days)
    write_files(where, files, force=force)
    if as_json:
        print_json({"directory": str(where), "files": sorted(files), "hosts": list(hosts), "days": days})
        return
    print_facts(
        str(where),
        [
            ("daemon", f"tls_dir = {where / 'daemon'}"),
            ("worker", f"tls_dir = {where / 'worker'}"),
            ("admin", f"tls_dir = {where / 'admin'}"),
            ("hosts", ", ".join(hosts)),
        ],
    )
    note(f"valid for {days} days; keep ca.key where the daemon is not")


def _hosts_of(address: str | None) -> tuple[str, ...]:
    try:
        host = parse_address(address).host if address else ""
    except ValueError as error:
        raise click.BadParameter(f"{address!r}: {error}") from error
    return (host,) if host else ("localhost", "127.0.0.1", "::1", socket.gethostname())
