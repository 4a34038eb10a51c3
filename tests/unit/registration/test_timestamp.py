"""A time-stamp token counts when its authority signed exactly the lock that is there."""

import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gradnoise.base.errors import InputError
from gradnoise.registration import verify_timestamp
from gradnoise.registration.timestamp import write_request

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl as the authority")

PLAN = Path("plan.yaml")
SETTINGS = """
[tsa]
default_tsa = here
[here]
serial = serial
crypto_device = builtin
default_policy = 1.2.3.4.1
digests = sha256
signer_digest = sha256
ess_cert_id_alg = sha256
[stamping]
extendedKeyUsage = critical,timeStamping
"""


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority's certificates (a root, and a signer below it) and their keys."""
    folder = tmp_path_factory.mktemp("authority")
    new = ("req", "-newkey", "rsa:2048", "-nodes", "-subj")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("tsa.cnf").write_text(SETTINGS)
        for name in ("root", "stranger"):
            openssl(
                *new, f"/CN={name}", "-x509", "-days", "30", "-keyout", f"{name}.key", "-out", f"{name}.pem"
            )
        openssl(*new, "/O=Example/CN=Time stamps", "-keyout", "tsa.key", "-out", "tsa.csr")
        sign = ("-CA", "root.pem", "-CAkey", "root.key", "-set_serial", "7", "-days", "30")
        extension = ("-extfile", "tsa.cnf", "-extensions", "stamping")
        openssl("x509", "-req", "-in", "tsa.csr", *sign, *extension, "-out", "tsa.pem")
    return folder


@pytest.fixture
def stamped(authority: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a lock, the authority's token over it, and its root."""
    monkeypatch.chdir(tmp_path)
    Path("plan.lock.json").write_text('{"format": 1}\n')
    stamp(authority)
    shutil.copy(authority / "root.pem", "plan.lock.pem")
    return tmp_path


def stamp(authority: Path) -> None:
    """The authority answers the request for a time stamp over the lock."""
    request = write_request(PLAN).resolve()
    answer = request.with_suffix(".tsr")
    files = ("-queryfile", str(request), "-out", str(answer), "-signer", "tsa.pem", "-inkey", "tsa.key")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(authority)
        Path("serial").write_text("01\n")
        openssl("ts", "-reply", "-config", "tsa.cnf", *files)


def reason() -> str:
    found = verify_timestamp(PLAN)
    assert found is not None
    assert (found.verified, found.utc, found.authority) == (False, None, None)
    assert found.reason is not None
    assert "\n" not in found.reason
    return found.reason


def test_a_token_over_the_lock_tells_when_and_who(stamped: Path) -> None:
    found = verify_timestamp(PLAN)
    assert found is not None
    assert (found.verified, found.reason) == (True, None)
    assert found.authority == "CN=Time stamps,O=Example"
    assert found.utc is not None
    assert abs(datetime.fromisoformat(found.utc) - datetime.now(UTC)) < timedelta(minutes=5)


def test_the_request_depends_on_the_lock_alone(stamped: Path) -> None:
    first = write_request(PLAN).read_bytes()
    assert write_request(PLAN).read_bytes() == first
    Path("plan.lock.json").write_text('{"format": 2}\n')
    assert write_request(PLAN).read_bytes() != first


def test_one_other_byte_in_the_lock_and_the_token_is_not_its(stamped: Path) -> None:
    Path("plan.lock.json").write_text('{"format":  1}\n')
    assert "Mismatch" in reason()


def test_an_unknown_root_vouches_for_nothing(stamped: Path, authority: Path) -> None:
    shutil.copy(authority / "stranger.pem", "plan.lock.pem")
    assert "certificate verify error" in reason()


def test_a_refusal_of_the_authority_is_no_token(stamped: Path, authority: Path) -> None:
    # DER of TimeStampResp {status PKIStatusInfo {status rejection(2)}}
    Path("plan.lock.tsr").write_bytes(bytes.fromhex("30053003020102"))
    assert "plan.lock.tsr" in reason()


@pytest.mark.parametrize("content", [b"", b"no token", b"\x30\x80"])
def test_a_damaged_token_is_not_verified(stamped: Path, content: bytes) -> None:
    Path("plan.lock.tsr").write_bytes(content)
    assert "plan.lock.tsr" in reason()


def test_every_byte_of_time_and_hash_counts(stamped: Path) -> None:
    whole = Path("plan.lock.tsr").read_bytes()
    digest = write_request(PLAN).read_bytes()[-35:-3]
    start = whole.index(digest[:8])
    for place in range(start, start + 60):
        changed = bytearray(whole)
        changed[place] ^= 1
        Path("plan.lock.tsr").write_bytes(changed)
        reason()


def test_roots_must_be_there_and_be_certificates(stamped: Path) -> None:
    Path("plan.lock.pem").write_text("no certificate")
    assert reason() == "plan.lock.pem: holds no certificates in PEM"
    Path("plan.lock.pem").unlink()
    assert reason() == "plan.lock.pem: missing"


def test_without_a_token_there_is_none_and_without_a_lock_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert verify_timestamp(PLAN) is None
    with pytest.raises(InputError, match=r"plan\.lock\.json: missing"):
        write_request(PLAN)
