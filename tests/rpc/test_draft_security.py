"""Who a draft lets in, and that a target with the wrong credentials goes on without it and says why."""

from __future__ import annotations

import datetime
import logging
import pickle
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import SecretStr

from paceline.config import DraftSecurity, DraftSettings, parse_settings
from paceline.errors import ConfigError
from paceline.rpc.draft_credentials import OPEN, DraftCredentials, new_token
from tests.rpc.replicas import (
    SEEDED,
    DraftReplica,
    TargetReplica,
    draft_replica,
    metrics,
    plain,
    target_replica,
    tokens,
    until,
)

MARKED = "marked-secret-0123456789-0123456789"


async def drafted(target: TargetReplica, draft: DraftReplica) -> int:
    """Candidates it gave for one request, whose tokens are what they always are."""
    await target.connect(draft.address)
    frames = await target.generate(**SEEDED)
    assert tokens(frames) == plain(**SEEDED)
    return metrics(frames).drafted


def certificates(folder: Path, *, authority: str = "ours", name: str = "paceline-draft") -> DraftSecurity:
    """A fresh authority, and a key with a certificate of it."""
    folder.mkdir(exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, authority)])
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    made = []
    for key, who, ca in ((keys[0], issuer, True), (keys[1], subject, False)):
        builder = x509.CertificateBuilder().subject_name(who).issuer_name(issuer).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        made.append(builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    private = keys[1].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    files = {"ca_file": made[0], "cert_file": made[1], "key_file": private}
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return DraftSecurity(mode="tls", **{file: str(folder / file) for file in files})


async def test_the_token_of_the_deployment_opens_the_port() -> None:
    credentials = DraftCredentials.of(DraftSecurity(), new_token())
    async with draft_replica(credentials=credentials) as draft, target_replica(credentials=credentials) as target:
        assert await drafted(target, draft) > 0


@pytest.mark.parametrize("shown", [OPEN, DraftCredentials(SecretStr("another"))], ids=["none", "another"])
async def test_a_wrong_token_is_unauthenticated_and_the_target_says_so(
    shown: DraftCredentials, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        async with (
            draft_replica(credentials=DraftCredentials(SecretStr(MARKED))) as draft,
            target_replica(credentials=shown) as target,
        ):
            target.pool.set_members({"draft": draft.address})
            await until(lambda: target.pool.problems.get("draft", "").startswith("UNAUTHENTICATED"))
            problem = target.pool.problems["draft"]
            frames = await target.generate(**SEEDED)
    assert problem.startswith("UNAUTHENTICATED: this draft wants the token of its deployment")
    assert tokens(frames) == plain(**SEEDED)
    assert draft.service.streams == {}
    assert MARKED not in caplog.text + problem


async def test_certificates_of_one_authority_open_the_port(tmp_path: Path) -> None:
    credentials = DraftCredentials.of(certificates(tmp_path), None)
    async with draft_replica(credentials=credentials) as draft, target_replica(credentials=credentials) as target:
        assert await drafted(target, draft) > 0


@pytest.mark.parametrize("stranger", ["no certificate", "another authority"])
async def test_a_target_without_a_certificate_of_that_authority_gets_no_stream(stranger: str, tmp_path: Path) -> None:
    ours = DraftCredentials.of(certificates(tmp_path / "ours"), None)
    theirs = OPEN
    if stranger == "another authority":
        theirs = DraftCredentials.of(certificates(tmp_path / "theirs", authority="theirs"), None)
    async with draft_replica(credentials=ours) as draft, target_replica(credentials=theirs) as target:
        target.pool.set_members({"draft": draft.address})
        await until(lambda: target.pool.problems)
        assert "UNAVAILABLE" in target.pool.problems["draft"]
        assert draft.service.streams == {}


async def test_a_draft_under_another_name_is_not_believed(tmp_path: Path) -> None:
    security = certificates(tmp_path, name="somebody-else")
    credentials = DraftCredentials.of(security, None)
    async with draft_replica(credentials=credentials) as draft, target_replica(credentials=credentials) as target:
        target.pool.set_members({"draft": draft.address})
        await until(lambda: target.pool.problems)
        assert "UNAVAILABLE" in target.pool.problems["draft"]


@pytest.mark.parametrize("host", ["auto", "0.0.0.0", "10.0.0.7", "::"])
def test_an_open_port_is_refused_beyond_loopback(host: str) -> None:
    with pytest.raises(ConfigError, match=r"draft\.security: .*set draft\.host to 127\.0\.0\.1") as refused:
        parse_settings({"draft": {"host": host, "security": {"mode": "off"}}})
    assert refused.value.param == "draft.security"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_an_open_port_is_allowed_on_loopback(host: str) -> None:
    settings = parse_settings({"draft": {"host": host, "security": {"mode": "off"}}})
    assert DraftCredentials.of(settings.draft.security, None) == OPEN


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "token"}, "mode token needs one of token_file and token_environment"),
        ({"mode": "token", "token_file": "a", "token_environment": "B"}, "mode token needs one of"),
        ({"mode": "tls", "cert_file": "a"}, "mode tls needs cert_file, key_file and ca_file"),
        ({"token": MARKED}, "draft.security.token: unknown key"),
    ],
)
def test_settings_that_are_not_whole_are_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        parse_settings({"draft": {"security": fields}})
    assert MARKED not in str(refused.value)


def test_a_token_comes_from_a_file_or_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(f"{MARKED}\n")
    monkeypatch.setenv("TOKEN", MARKED)
    for fields in ({"token_file": str(tmp_path / "token")}, {"token_environment": "TOKEN"}):
        credentials = DraftCredentials.of(DraftSecurity(mode="token", **fields), None)
        assert credentials.metadata() == [("authorization", f"Bearer {MARKED}")]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), ("short", "at least 32"), (MARKED + "\nä", "printable ASCII")]
)
def test_a_token_that_cannot_be_used_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message) as refused:
        DraftCredentials.of(DraftSecurity(mode="token", token_file=str(file)), None)
    assert refused.value.param == "draft.security.token_file"
    assert MARKED not in str(refused.value)


def test_secrets_are_in_no_representation_but_reach_a_replica(tmp_path: Path) -> None:
    shared = DraftCredentials(token=SecretStr(MARKED))
    tls = DraftCredentials.of(certificates(tmp_path), None)
    assert MARKED not in f"{shared!r} {shared} {DraftSettings()!r} {shared.token}"
    assert "PRIVATE" not in repr(tls)
    assert pickle.loads(pickle.dumps(shared)).metadata() == shared.metadata()
