"""What the module pki_check says of keys and certificates, all of them real."""

import importlib.util
import inspect
import ipaddress
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

LIBRARY = Path(__file__).parents[2] / "roles/pki/library"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, LIBRARY / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


pki_check = load("pki_check")

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


@dataclass(frozen=True)
class Identity:
    """A certificate with its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    def key_pem(self, passphrase: str = "") -> str:
        encryption = (
            serialization.BestAvailableEncryption(passphrase.encode())
            if passphrase
            else serialization.NoEncryption()
        )
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
        ).decode()


def make(
    name: str,
    issuer: Identity | None = None,
    *,
    ca: bool = False,
    days: float = 100,
    names: tuple[str, ...] = (),
    purposes: tuple[x509.ObjectIdentifier, ...] | None = BOTH,
    since: float = 1,
    usage: tuple[str, ...] | None = None,
    identified: bool = True,
) -> Identity:
    """Make an identity that ends so many days from NOW, signed by itself or by an issuer."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=since))
        .not_valid_after(NOW + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if names:
        general: list[x509.GeneralName] = [
            x509.IPAddress(ipaddress.ip_address(n)) if n[0].isdigit() else x509.DNSName(n)
            for n in names
        ]
        builder = builder.add_extension(x509.SubjectAlternativeName(general), critical=False)
    if purposes is not None and not ca:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    if issuer is not None and identified:
        signer: Any = issuer.key.public_key()
        named = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer)
        builder = builder.add_extension(named, critical=False)
    if usage is not None:
        every = {name: name in usage for name in inspect.signature(x509.KeyUsage).parameters}
        builder = builder.add_extension(x509.KeyUsage(**every), critical=True)
    return Identity(builder.sign(issuer.key if issuer else key, hashes.SHA256()), key)


ROOT = make("root", ca=True, days=3650)
OTHER_ROOT = make("other root", ca=True, days=3650)
INTERMEDIATE = make("intermediate", ROOT, ca=True, days=2000)
HOST = make("web", ROOT, names=("web", "192.0.2.1"))


NOTHING = {"certificate": "", "trusted": "", "public_key": "", "in_order": False}


def has(leaf: Identity, chain: str = "", trusted: str = ROOT.pem, **changes: Any) -> dict[str, Any]:
    """What the module pki_host says of a host that has all this."""
    public = leaf.key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    found = {
        "certificate": leaf.pem + chain,
        "trusted": trusted,
        "public_key": public.decode(),
        "in_order": True,
    }
    return found | changes


def brought(
    host: str = "web", leaf: Identity = HOST, chain: str = "", **changes: Any
) -> dict[str, Any]:
    parameters = {
        "host": host,
        "brought": True,
        "certificate": leaf.pem + chain,
        "key": leaf.key_pem(),
        "key_passphrase": None,
        "ca": ROOT.pem,
        "trusted_files": [],
        "names": [],
        "has": NOTHING,
        "valid_days": 397,
        "renew_before_days": 30,
        "warn_before_days": 30,
    }
    return parameters | changes


def problem(parameters: dict[str, Any]) -> str:
    """What is wrong; it must be one thing."""
    (text,) = pki_check.look(parameters, NOW).problems
    assert isinstance(text, str)
    return text


def test_a_good_certificate_from_elsewhere_passes() -> None:
    found = pki_check.look(brought(), NOW)
    assert (found.problems, found.warnings) == ([], [])
    wanted = {"certificate": HOST.pem, "chain": "", "trusted": ROOT.pem, "sound": False}
    assert found.result == wanted


def test_the_chain_follows_the_certificate_without_the_root() -> None:
    leaf = make("web", INTERMEDIATE, names=("web",))
    # In the wrong order and with the root, as one often gets it.
    found = pki_check.look(brought(leaf=leaf, chain=ROOT.pem + INTERMEDIATE.pem), NOW)
    assert found.problems == []
    assert found.result["certificate"] == leaf.pem
    assert found.result["chain"] == INTERMEDIATE.pem


def test_a_chain_with_a_gap_is_refused() -> None:
    leaf = make("web", INTERMEDIATE, names=("web",))
    assert "No chain leads from the certificate in pki_certificate_file" in problem(
        brought(leaf=leaf)
    )


def test_an_intermediate_alone_is_no_authority_to_end_at() -> None:
    leaf = make("web", INTERMEDIATE, names=("web",))
    assert "No chain leads" in problem(brought(leaf=leaf, ca=INTERMEDIATE.pem))


def test_a_certificate_of_another_authority_is_refused() -> None:
    assert "No chain leads" in problem(brought(ca=OTHER_ROOT.pem))


def test_an_authority_of_the_same_name_is_another_one() -> None:
    assert "No chain leads" in problem(brought(ca=make("root", ca=True).pem))


def test_a_host_certificate_signs_nothing() -> None:
    middle = make("middle", ROOT)
    leaf = make("web", middle, names=("web",))
    assert "No chain leads" in problem(brought(leaf=leaf, chain=middle.pem))


def test_the_key_must_be_the_certificates() -> None:
    assert "is not that of the first certificate" in problem(brought(key=make("web").key_pem()))


@pytest.mark.parametrize(
    "host, names, fits",
    [
        ("web", ("web",), True),
        ("WEB", ("web",), True),
        ("web", ("other",), False),
        ("web.example.com", ("*.example.com",), True),
        ("a.web.example.com", ("*.example.com",), False),
        ("example.com", ("*.example.com",), False),
        ("web", ("*.example.com",), False),
        ("192.0.2.1", ("web", "192.0.2.1"), True),
        ("192.0.2.2", ("web", "192.0.2.1"), False),
        ("web", (), False),
    ],
)
def test_the_certificate_must_be_for_the_host(
    host: str, names: tuple[str, ...], fits: bool
) -> None:
    found = pki_check.look(brought(host, make("web", ROOT, names=names)), NOW)
    assert (found.problems == []) is fits
    if not fits:
        assert f"is not for {host}" in found.problems[0]


@pytest.mark.parametrize(
    "purposes, missing",
    [
        (BOTH, []),
        (None, []),
        ((ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,), []),
        (BOTH[:1], ["clients (clientAuth)"]),
        (BOTH[1:], ["servers (serverAuth)"]),
    ],
)
def test_the_certificate_must_serve_both_sides(
    purposes: tuple[x509.ObjectIdentifier, ...] | None, missing: list[str]
) -> None:
    leaf = make("web", ROOT, names=("web",), purposes=purposes)
    problems = pki_check.look(brought(leaf=leaf), NOW).problems
    assert len(problems) == len(missing)
    assert all(text in found for text, found in zip(missing, problems, strict=True))


def test_an_expired_certificate_is_refused() -> None:
    leaf = make("web", ROOT, names=("web",), days=-0.5)
    assert "CN=web has expired on 2030-01-01" in problem(brought(leaf=leaf))


def test_a_certificate_of_tomorrow_is_refused() -> None:
    leaf = make("web", ROOT, names=("web",), since=-1)
    assert "CN=web is valid only from 2030-01-02" in problem(brought(leaf=leaf))


def test_an_expired_authority_above_it_is_refused() -> None:
    root = make("old root", ca=True, days=-0.5)
    leaf = make("web", root, names=("web",))
    assert "CN=old root has expired" in problem(brought(leaf=leaf, ca=root.pem))


@pytest.mark.parametrize("days, warned", [(29.9, True), (30.1, False)])
def test_a_certificate_that_ends_soon_is_warned_of(days: float, warned: bool) -> None:
    found = pki_check.look(brought(leaf=make("web", ROOT, names=("web",), days=days)), NOW)
    assert found.problems == []
    assert bool(found.warnings) is warned
    if warned:
        assert "expires on 2030-01-31, 29 days from now. Bring a new one" in found.warnings[0]


def test_the_key_may_have_a_passphrase() -> None:
    encrypted = HOST.key_pem("long enough")
    assert not pki_check.look(brought(key=encrypted, key_passphrase="long enough"), NOW).problems
    for key, passphrase, says in [
        (encrypted, None, "is encrypted: set pki_key_passphrase"),
        (encrypted, "wrong", "cannot be read with the passphrase in pki_key_passphrase"),
        (HOST.key_pem(), "needless", "has no passphrase, yet pki_key_passphrase is set"),
        ("no key", None, "no private key that can be read as PEM"),
    ]:
        with pytest.raises(ValueError, match=says):
            pki_check.look(brought(key=key, key_passphrase=passphrase), NOW)


def test_what_is_no_pem_is_named() -> None:
    with pytest.raises(ValueError, match="pki_ca_file holds no certificate"):
        pki_check.look(brought(ca="nothing"), NOW)


def test_other_authorities_are_trusted_too_each_once(tmp_path: Path) -> None:
    extra = tmp_path / "next.pem"
    extra.write_text(OTHER_ROOT.pem + ROOT.pem)
    found = pki_check.look(brought(trusted_files=[str(extra)]), NOW)
    assert found.result["trusted"] == ROOT.pem + OTHER_ROOT.pem


@dataclass
class Authority:
    """An authority's files, and the parameters that name them."""

    folder: Path

    def parameters(
        self, identity: Identity = ROOT, above: str = "", **changes: Any
    ) -> dict[str, Any]:
        certificate, key = self.folder / "ca.pem", self.folder / "ca.key"
        certificate.write_text(identity.pem + above)
        key.write_text(identity.key_pem())
        key.chmod(0o600)
        parameters = brought(
            brought=False,
            certificate=None,
            key=None,
            ca=None,
            authority_certificate_file=str(certificate),
            authority_key_file=str(key),
            authority_key_passphrase=None,
        )
        return parameters | changes


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def test_a_good_authority_passes(authority: Authority) -> None:
    found = pki_check.look(authority.parameters(), NOW)
    assert (found.problems, found.warnings) == ([], [])
    assert found.result == {
        "trusted": ROOT.pem,
        "chain": "",
        "not_after": "20310202120000Z",
        "renew": True,
        "sound": False,
    }


def test_an_intermediate_authority_is_part_of_the_chain(authority: Authority) -> None:
    found = pki_check.look(authority.parameters(INTERMEDIATE, ROOT.pem), NOW)
    assert found.problems == []
    assert (found.result["chain"], found.result["trusted"]) == (INTERMEDIATE.pem, ROOT.pem)


def test_an_intermediate_authority_needs_its_root(authority: Authority) -> None:
    assert "Append those that it was signed with" in problem(authority.parameters(INTERMEDIATE))


def test_a_host_is_no_authority(authority: Authority) -> None:
    assert "may not sign others" in problem(authority.parameters(HOST, ROOT.pem))


def test_the_authoritys_key_must_be_its_own(authority: Authority) -> None:
    parameters = authority.parameters()
    key = Path(parameters["authority_key_file"])
    key.write_text(OTHER_ROOT.key_pem())
    assert "pki_authority_key_file is not that of" in problem(parameters)


def test_the_authoritys_key_must_be_private(authority: Authority) -> None:
    parameters = authority.parameters()
    Path(parameters["authority_key_file"]).chmod(0o640)
    assert "chmod 600" in problem(parameters)


def test_an_expired_authority_is_refused(authority: Authority) -> None:
    assert "has expired" in problem(authority.parameters(make("old", ca=True, days=-0.5)))


def test_an_authority_that_ends_soon_is_warned_of_and_outlived_by_nothing(
    authority: Authority,
) -> None:
    ending = make("ending", ca=True, days=20)
    found = pki_check.look(authority.parameters(ending), NOW)
    assert found.problems == []
    assert "expires on 2030-01-21" in found.warnings[0]
    assert found.result["not_after"] == "20300121120000Z"
    # What it signed last ends with it: to sign again would gain nothing, on every run.
    last = make("web", ending, days=20)
    again = pki_check.look(authority.parameters(ending, has=has(last)), NOW)
    assert again.result["renew"] is False
    earlier = make("web", ending, days=10)
    assert pki_check.look(authority.parameters(ending, has=has(earlier)), NOW).result["renew"]


@given(days=st.integers(-400, 400), renew=st.integers(0, 396))
def test_a_certificate_is_due_when_fewer_days_are_left(days: int, renew: int) -> None:
    current = CURRENT.pem
    end = CURRENT.certificate.not_valid_after_utc
    now = end - timedelta(days=days)
    due = pki_check.is_due(current, timedelta(days=renew), now + timedelta(days=397), now)
    assert due is (days < renew and days < 397)


CURRENT = make("web", ROOT)


def test_what_cannot_be_read_is_due() -> None:
    for current in ("", "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"):
        assert pki_check.is_due(current, timedelta(days=1), NOW + timedelta(days=2), NOW)


NAMES = ("web", "web.example", "192.0.2.1", "2001:db8::1")
SIGNS = ("digital_signature",)
ASKED = make("web", ROOT, names=NAMES, usage=SIGNS, days=300)


def sound(authority: Authority, found: dict[str, Any], **changes: Any) -> bool:
    parameters = authority.parameters(has=found, **{"names": list(NAMES)} | changes)
    return bool(pki_check.look(parameters, NOW).result["sound"])


def test_a_host_that_has_all_it_is_to_have_is_left_alone(authority: Authority) -> None:
    assert sound(authority, has(ASKED))
    # Names are a set: their order is nobody's concern.
    assert sound(authority, has(ASKED), names=list(reversed(NAMES)))


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(NOTHING, id="nothing"),
        pytest.param(has(ASKED, in_order=False), id="a file of another mode"),
        pytest.param(has(ASKED, chain=INTERMEDIATE.pem), id="a chain that is no more"),
        pytest.param(has(ASKED, trusted=ROOT.pem + OTHER_ROOT.pem), id="an authority too many"),
        pytest.param(has(ASKED, trusted=""), id="no authority"),
        pytest.param(has(ASKED, public_key=has(HOST)["public_key"]), id="another key"),
        pytest.param(has(ASKED, public_key=""), id="no key"),
        pytest.param(has(ASKED, public_key="-----BEGIN"), id="half a key"),
        pytest.param(
            has(make("web", OTHER_ROOT, names=NAMES, usage=SIGNS)), id="another authority's"
        ),
        pytest.param(has(make("web", ROOT, names=NAMES, usage=SIGNS, days=20)), id="due"),
        pytest.param(has(make("web", ROOT, names=NAMES[:-1], usage=SIGNS)), id="a name too few"),
        pytest.param(has(make("web", ROOT, names=(*NAMES, "w"), usage=SIGNS)), id="one too many"),
        pytest.param(has(make("w", ROOT, names=NAMES, usage=SIGNS)), id="another common name"),
        pytest.param(
            has(make("web", ROOT, names=NAMES, usage=SIGNS, identified=False)), id="of any key"
        ),
        pytest.param(has(make("web", ROOT, names=NAMES)), id="any usage"),
        pytest.param(
            has(make("web", ROOT, names=NAMES, usage=(*SIGNS, "key_agreement"))), id="more usage"
        ),
        pytest.param(
            has(make("web", ROOT, names=NAMES, usage=SIGNS, purposes=BOTH[:1])), id="one purpose"
        ),
    ],
)
def test_a_host_that_lacks_anything_is_not(authority: Authority, found: dict[str, Any]) -> None:
    assert not sound(authority, found)


def test_a_host_with_its_certificate_from_elsewhere_is_left_alone() -> None:
    assert pki_check.look(brought(has=has(HOST)), NOW).result["sound"]
    for found in (NOTHING, has(HOST, in_order=False), has(ASKED), has(HOST, trusted="")):
        assert not pki_check.look(brought(has=found), NOW).result["sound"]


PKI_HOST = load("pki_host")


def test_what_a_host_has_is_read_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "host.key").write_text(ASKED.key_pem())
    (tmp_path / "host.pem").write_text(ASKED.pem)
    (tmp_path / "ca.pem").write_text(ROOT.pem)
    assert PKI_HOST.look(tmp_path, "ssl-cert") == has(ASKED, in_order=False)


def test_a_key_that_kafka_does_not_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "host.key").write_bytes(
        ASKED.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
    )
    assert PKI_HOST.look(tmp_path, "ssl-cert")["public_key"] == ""


def test_an_authority_with_a_name_of_its_own_for_its_key(authority: Authority) -> None:
    builder = x509.CertificateBuilder(
        ROOT.certificate.subject,
        ROOT.certificate.subject,
        ROOT.key.public_key(),
        x509.random_serial_number(),
        ROOT.certificate.not_valid_before_utc,
        ROOT.certificate.not_valid_after_utc,
    )
    named = builder.add_extension(x509.SubjectKeyIdentifier(b"name"), critical=False)
    named = named.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    again = Identity(named.sign(ROOT.key, hashes.SHA256()), ROOT.key)
    found = has(ASKED, trusted=again.pem)
    parameters = authority.parameters(again, has=found, names=list(NAMES))
    assert not pki_check.look(parameters, NOW).result["sound"]


def test_what_is_missing_or_garbage_is_told_apart(tmp_path: Path) -> None:
    assert PKI_HOST.look(tmp_path / "none", "ssl-cert") == NOTHING
    for name in ("host.key", "host.pem", "ca.pem"):
        (tmp_path / name).write_bytes(b"\xff\x00")
    found = PKI_HOST.look(tmp_path, "ssl-cert")
    assert found["certificate"]
    assert found["public_key"] == ""


def test_owner_group_mode_and_kind_of_a_file_count(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    file.chmod(0o640)
    owner, group = file.owner(), file.group()
    assert PKI_HOST.owned(file, group, 0o640) is (owner == "root")
    assert not PKI_HOST.owned(file, "nobody-has-this-group", 0o640)
    assert not PKI_HOST.owned(file, group, 0o644)
    (tmp_path / "link").symlink_to(file)
    assert not PKI_HOST.owned(tmp_path / "link", group, 0o640)
    assert not PKI_HOST.owned(tmp_path / "none", group, 0o640)
