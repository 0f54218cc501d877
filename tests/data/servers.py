"""Servers to read prepared sources from: a real S3 protocol server, and an HTTP server that fails on demand."""

import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path

import s3fs
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def moto_server() -> Iterator[str]:
    """The address of a moto server in a process of its own; it keeps everything in memory."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | CREDENTIALS
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(address, timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, "the moto server ended by itself"
                time.sleep(0.1)
        yield address
    finally:
        process.kill()
        process.wait()


def upload(folder: Path, bucket: str, endpoint: str) -> str:
    """Put the files of a folder into a new bucket; returns its address."""
    options = {"key": "test", "secret": "test", "endpoint_url": endpoint, "skip_instance_cache": True}
    store = s3fs.S3FileSystem(**options, client_kwargs={"region_name": "us-east-1"})
    store.call_s3("create_bucket", Bucket=bucket)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        store.put_file(str(path), f"{bucket}/{path.relative_to(folder)}")
    return f"s3://{bucket}"


def free_port() -> int:
    """A port that nothing listens at now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def certificate(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's side and a client's side of TLS for 127.0.0.1, with a certificate that nobody else trusts."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(timezone.utc)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "certificate.pem"
    path.write_bytes(private + made.public_bytes(pem))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return server, ssl.create_default_context(cafile=str(path))


class FaultyServer:
    """Serves `files` (path -> bytes) by HTTP ranges; also enough of S3 and Google's protocol to read an object.

    `faults` are used up by GET requests in turn: a status, "close" (in the middle of the content), "reset" (no
    answer at all), "cut" (half of the range, said to be all), "hang", "whole" (no ranges), None (as it should be).
    """

    def __init__(self, port: int = 0, tls: ssl.SSLContext | None = None):
        self.files: dict[str, bytes] = {}
        self.faults: list[int | str | None] = []
        self.always: int | str | None = None
        self.gets = 0
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                outer._answer(self, with_body=False)

            def do_GET(self):
                outer._answer(self, with_body=True)

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.address = f"http{'s' if tls else ''}://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        path, _, query = request.path.partition("?")
        google = re.fullmatch(r"(/download)?/storage/v1/b/([^/]+)/o/(.+)", urllib.parse.unquote(path))
        if google:
            path = f"/{google[2]}/{google[3]}"
        fault = None
        is_content = with_body and (not google or "alt=media" in query)
        if is_content:
            self.gets += 1
            fault = self.faults.pop(0) if self.faults else self.always
        content = self.files.get(urllib.parse.unquote(path))
        status = 404 if content is None else 200
        if isinstance(fault, int):
            status = fault
        if status != 200:
            self._send(request, status, b"<Error><Code>SlowDown</Code></Error>" if status == 503 else b"", with_body)
            return
        if google and not is_content:
            found = {"name": google[3], "bucket": google[2], "size": str(len(content)), "etag": str(hash(content))}
            self._send(request, 200, json.dumps(found).encode(), True, {"Content-Type": "application/json"})
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        headers = {"ETag": f'"{hash(content)}"', "Last-Modified": formatdate(0, usegmt=True)}
        if wanted and fault != "whole":
            start, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
            if start >= len(content):
                self._send(request, 416, b"", with_body)
                return
            headers["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
            status, content = 206, content[start : last + 1]
        if fault == "cut":
            content = content[: len(content) // 2]
        if fault == "hang":
            self.released.wait(5)
        if fault in ("close", "reset"):
            request.close_connection = True
            if fault == "close":
                request.send_response(status)
                request.send_header("Content-Length", str(len(content)))
                request.end_headers()
                request.wfile.write(content[: len(content) // 2])
            return
        self._send(request, status, content, with_body, headers)

    def _send(self, request, status: int, content: bytes, with_body: bool, headers: dict[str, str] | None = None):
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if with_body:
            request.wfile.write(content)
