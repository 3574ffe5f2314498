"""HTTPS with certificates of our own: start, renewal, health check."""

import os
import signal
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from app.commands.healthcheck import parser
from app.settings import Settings
from tests.support.subprocesses import command, fails, free_port, wait_until

pytestmark = pytest.mark.slow  # starts processes

Certificate = tuple[Path, Path]


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return issue(tmp_path, "first")


def issue(folder: Path, name: str) -> Certificate:
    file, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", f"/CN={name}",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(file)],
        check=True, capture_output=True,
    )  # fmt: skip
    return file, key


def healthcheck(port: int, *flags: str, **environment: str) -> int:
    variables = {"THIRTYTWO_HOST": "0.0.0.0", "THIRTYTWO_PORT": str(port), **environment}  # noqa: S104
    return subprocess.run(
        command("healthcheck", *flags), env=os.environ | variables, timeout=60, stderr=subprocess.DEVNULL, check=False
    ).returncode


@contextmanager
def https(weights: Path, certificate: Certificate, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    port = free_port()
    tls = ("--tls-cert", str(certificate[0]), "--tls-key", str(certificate[1]))
    with subprocess.Popen(
        command("--weights", str(weights), "--port", str(port), "--max-batch", "1", *tls, *flags),
        stderr=subprocess.DEVNULL,
    ) as running:
        try:
            wait_until(lambda: healthcheck(port, THIRTYTWO_TLS_CERT=str(certificate[0])) == 0)
            yield running, port
        finally:
            running.kill()


def presented(port: int) -> str:
    return ssl.get_server_certificate(("127.0.0.1", port)).strip()


def test_https_and_its_health_check(tiny_weights: Path, certificate: Certificate, cat: bytes) -> None:
    with https(tiny_weights, certificate) as (running, port):
        trust = ssl.create_default_context(cafile=str(certificate[0]))
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trust) as client:
            response = client.post("/predict", content=cat, headers={"content-type": "image/png"})
            assert response.status_code == 200
        assert healthcheck(port) == 1  # without TLS
        assert healthcheck(port, "--tls-cert", str(certificate[0])) == 0
        running.terminate()
        assert running.wait(30) == 0
        assert healthcheck(port, THIRTYTWO_TLS_CERT=str(certificate[0])) == 1


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sighup_reloads_the_certificate(
    tiny_weights: Path, certificate: Certificate, tmp_path: Path, workers: str
) -> None:
    file, key = certificate
    renewed = [path.read_bytes() for path in issue(tmp_path, "second")]
    with https(tiny_weights, certificate, "--workers", workers) as (running, port):
        first = file.read_text().strip()
        assert presented(port) == first
        file.write_bytes(renewed[0])  # without its key, as in the middle of a renewal
        running.send_signal(signal.SIGHUP)
        time.sleep(1)
        assert {presented(port) for _ in range(8)} == {first}
        key.write_bytes(renewed[1])
        running.send_signal(signal.SIGHUP)
        wait_until(lambda: {presented(port) for _ in range(8)} == {renewed[0].decode().strip()})
        running.terminate()
        assert running.wait(30) == 0


def test_unusable_certificates_are_one_line(certificate: Certificate, tmp_path: Path) -> None:
    file, key = (str(path) for path in certificate)
    locked = str(tmp_path / "locked.key")
    encrypt = ["openssl", "rsa", "-aes128", "-passout", "pass:secret", "-in", key, "-out", locked]
    subprocess.run(encrypt, check=True, capture_output=True)
    for wrong in ((file, file), (key, key), (file, locked)):
        line = fails("--port", "0", "--tls-cert", wrong[0], "--tls-key", wrong[1])
        assert line.startswith("error: THIRTYTWO_TLS_CERT, THIRTYTWO_TLS_KEY: not a certificate chain and its")
        assert line.count("\n") == 1


def test_health_check_has_the_defaults_of_the_settings() -> None:
    defaults = parser().parse_args([])
    assert (defaults.host, defaults.port) == (Settings().host, Settings().port)
