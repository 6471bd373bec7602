"""Receivers of notifications on this machine: an HTTP server, a mail server, and a certificate that both can have."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email import message_from_bytes
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from helpers.service import free_port


@dataclass
class Hooks:
    """What an HTTP server got, and the statuses that it answers, the last one for all that follow."""

    port: int = 0
    statuses: list[int] = field(default_factory=lambda: [204])
    pause: float = 0.0  # seconds before each answer
    got: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)  # path, headers in lower case, body


@contextlib.contextmanager
def hook_server(certificate: Path | None = None) -> Iterator[Hooks]:
    """Run an HTTP server, or with a certificate an HTTPS server."""
    hooks = Hooks()

    class Handler(BaseHTTPRequestHandler):
        """Records each request."""

        def do_POST(self) -> None:
            """Answer with the next status."""
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hooks.got.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            time.sleep(hooks.pause)
            status = hooks.statuses.pop(0) if len(hooks.statuses) > 1 else hooks.statuses[0]
            self.send_response(status)
            self.send_header("Location", f"http://127.0.0.1:{hooks.port}/elsewhere")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate is not None:
        server.socket = _server_context(certificate).wrap_socket(server.socket, server_side=True)
    hooks.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hooks
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class Mailbox:
    """E-mail that a server got. ``refuse``: its answer to every recipient, if so."""

    port: int = 0
    refuse: str | None = None
    got: list[tuple[list[str], Message]] = field(default_factory=list)  # recipients, message

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:  # noqa: N802 - aiosmtpd's own
        """Accept or refuse a recipient."""
        if self.refuse:
            return self.refuse
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd's own
        """Keep a message."""
        self.got.append((list(envelope.rcpt_tos), message_from_bytes(envelope.content)))
        return "250 OK"


@contextlib.contextmanager
def mail_server(certificate: Path | None = None, *, password: str | None = None) -> Iterator[Mailbox]:
    """Run a mail server, with a certificate one that needs STARTTLS and the password."""
    mailbox = Mailbox()

    def authenticate(*arguments: Any) -> AuthResult:
        return AuthResult(success=arguments[-1].password == (password or "").encode())

    options: dict[str, Any] = {}
    if certificate is not None:
        options = {"tls_context": _server_context(certificate), "require_starttls": True, "auth_required": True}
    mailbox.port = free_port()  # aiosmtpd calls the port that it is given, so it has to be known
    controller = Controller(mailbox, hostname="127.0.0.1", port=mailbox.port, authenticator=authenticate, **options)
    controller.start()
    try:
        yield mailbox
    finally:
        controller.stop()


def make_certificate(path: Path) -> Path:
    """Write a self-signed certificate of localhost with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - datetime.timedelta(days=1))
    builder = builder.not_valid_after(now + datetime.timedelta(days=1))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    certificate = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


def _server_context(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context
