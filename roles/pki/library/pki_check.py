"""Ansible module: check keys and certificates on the control host, before a host gets any."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DOCUMENTATION = """
module: pki_check
short_description: Check keys and certificates on the control host
description:
  - Looks at a certificate that was brought from elsewhere, or at the authority that is to sign one,
    and fails with everything that is wrong with it. Warns of what ends soon.
  - Returns what the host is to trust, and whether the certificate that it has is due.
  - Changes nothing. Needs the Python package cryptography (42 or newer) where it runs.
options:
  host:
    description: The host's name.
    type: str
    required: true
  brought:
    description: Whether the certificate comes from elsewhere. Otherwise the authority is checked.
    type: bool
    required: true
  certificate:
    description: PEM of the certificate from elsewhere, with its chain.
    type: str
  key:
    description: PEM of its key.
    type: str
  key_passphrase:
    description: Passphrase of that key.
    type: str
  ca:
    description: PEM of the authorities that it comes from.
    type: str
  authority_certificate_file:
    description: The authority's certificate, and those that it was signed with.
    type: path
  authority_key_file:
    description: The authority's key.
    type: path
  authority_key_passphrase:
    description: Passphrase of the authority's key.
    type: str
  trusted_files:
    description: PEM files of more authorities to trust.
    type: list
    elements: path
    default: []
  names:
    description: The host names and addresses that a certificate of the authority is for.
    type: list
    elements: str
    default: []
  has:
    description: What the host has, as the module pki_host returns it.
    type: dict
    required: true
  valid_days:
    description: Number of days for which a new certificate is valid.
    type: int
    required: true
  renew_before_days:
    description: Number of days left below which the certificate that the host has is due.
    type: int
    required: true
  warn_before_days:
    description: Number of days left below which the certificate from elsewhere, or the authority,
      is warned of.
    type: int
    required: true
"""

EXAMPLES = """
- name: Check the authority
  pki_check:
    host: "{{ inventory_hostname }}"
    brought: false
    authority_certificate_file: /srv/pki/ca.pem
    authority_key_file: /srv/pki/ca.key
    names: ["{{ inventory_hostname }}"]
    has: "{{ found_by_pki_host }}"
    valid_days: 397
    renew_before_days: 30
    warn_before_days: 180
  delegate_to: localhost
"""

RETURN = """
trusted:
  description: PEM of all authorities to trust.
  type: str
chain:
  description: PEM of what stands between the certificate and a trusted authority. Often empty.
  type: str
certificate:
  description: PEM of the certificate from elsewhere, without its chain.
  type: str
not_after:
  description: When a certificate that is signed now is to end (YYYYMMDDHHMMSSZ).
  type: str
renew:
  description: Whether the certificate that the host has is due.
  type: bool
sound:
  description: Whether the host has all that it is to have, so that there is nothing to do.
  type: bool
"""

# As large as any chain gets.
LONGEST_CHAIN = 10

# The extension KeyUsage, as it is encoded, with digitalSignature alone (RFC 5280, 4.2.1.3).
SIGNS_ALONE = bytes.fromhex("03020780")

Certificates = Sequence[x509.Certificate]


@dataclass
class Findings:
    """What is wrong, what will be, and what the role goes on with."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)


def read_certificates(text: str, name: str) -> list[x509.Certificate]:
    """Read all certificates of a PEM text. Raises ValueError, naming it, if there are none."""
    try:
        return x509.load_pem_x509_certificates(text.encode())
    except ValueError as error:
        raise ValueError(
            f"{name} holds no certificate that can be read as PEM ({error})."
        ) from error


def read_key(text: str, passphrase: str | None, name: str) -> Any:
    """Read a private key. Raises ValueError, naming it, with what is wrong."""
    try:
        return serialization.load_pem_private_key(
            text.encode(), passphrase.encode() if passphrase else None
        )
    except TypeError as error:
        what = (
            f"has no passphrase, yet {name.replace('_file', '_passphrase')} is set"
            if passphrase
            else f"is encrypted: set {name.replace('_file', '_passphrase')}"
        )
        raise ValueError(f"The key in {name} {what}.") from error
    except ValueError as error:
        what = (
            f"cannot be read with the passphrase in {name.replace('_file', '_passphrase')}"
            if passphrase
            else "is no private key that can be read as PEM"
        )
        raise ValueError(f"The key in {name} {what}.") from error


def public_bytes(key: Any) -> bytes:
    """Return a public key in the one form in which equal keys are equal."""
    encoded: bytes = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return encoded


def issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Tell whether one certificate signed the other."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def is_root(certificate: x509.Certificate) -> bool:
    """Tell whether a certificate signed itself."""
    return issued_by(certificate, certificate)


def is_authority(certificate: x509.Certificate) -> bool:
    """Tell whether a certificate may sign others."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def path_to_root(
    certificate: x509.Certificate, between: Certificates, trusted: Certificates
) -> list[x509.Certificate] | None:
    """Return the certificates from the one after `certificate` to a trusted root.

    None if there is no such path. Where there are several, one that is valid for longer wins.
    """
    if is_root(certificate):
        return [] if certificate in trusted else None
    candidates = sorted(
        {*between, *trusted} - {certificate}, key=lambda c: c.not_valid_after_utc, reverse=True
    )
    paths: list[list[x509.Certificate]] = [[]]
    for _ in range(LONGEST_CHAIN):
        longer = []
        for path in paths:
            last = path[-1] if path else certificate
            for issuer in candidates:
                if issuer in path or not is_authority(issuer) or not issued_by(last, issuer):
                    continue
                if is_root(issuer):
                    if issuer in trusted:
                        return [*path, issuer]
                else:
                    longer.append([*path, issuer])
        paths = longer
    return None


def name_of(certificate: x509.Certificate) -> str:
    """Return a certificate's subject as one reads it."""
    return certificate.subject.rfc4514_string() or "(no subject)"


def date(moment: datetime) -> str:
    """Return a day as one reads it."""
    return f"{moment:%Y-%m-%d}"


def pem(certificates: Iterable[x509.Certificate]) -> str:
    """Return certificates as PEM, each once."""
    return "".join(
        certificate.public_bytes(serialization.Encoding.PEM).decode()
        for certificate in dict.fromkeys(certificates)
    )


def is_for(certificate: x509.Certificate, host: str) -> bool:
    """Tell whether a certificate is for a host name or an address."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False
    try:
        return ipaddress.ip_address(host) in names.get_values_for_type(x509.IPAddress)
    except ValueError:
        pass
    host = host.lower().rstrip(".")
    patterns = {host, f"*.{host.partition('.')[2]}"} if "." in host else {host}
    return not patterns.isdisjoint(
        name.lower().rstrip(".") for name in names.get_values_for_type(x509.DNSName)
    )


def missing_purposes(certificate: x509.Certificate) -> list[str]:
    """Return the purposes that a host needs and that the certificate excludes."""
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return []
    if ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in usage:
        return []
    purposes = {
        "servers (serverAuth)": ExtendedKeyUsageOID.SERVER_AUTH,
        "clients (clientAuth)": ExtendedKeyUsageOID.CLIENT_AUTH,
    }
    return [name for name, purpose in purposes.items() if purpose not in usage]


def check_time(what: str, certificates: Certificates, warn_days: int, now: datetime) -> Findings:
    """Check that all of a chain's certificates are valid, for some time to come."""
    found = Findings()
    for certificate in certificates:
        end = certificate.not_valid_after_utc
        named = f"{what}: {name_of(certificate)}"
        if certificate.not_valid_before_utc > now:
            found.problems.append(
                f"{named} is valid only from {date(certificate.not_valid_before_utc)}. Is the "
                "control host's clock right?"
            )
        elif end <= now:
            found.problems.append(f"{named} has expired on {date(end)}. Replace it.")
        elif end < now + timedelta(days=warn_days):
            found.warnings.append(
                f"{named} expires on {date(end)}, {(end - now).days} days from now."
            )
    return found


def check_brought(
    host: str,
    certificates: Certificates,
    key: Any,
    trusted: Certificates,
    warn_days: int,
    now: datetime,
) -> Findings:
    """Check a certificate from elsewhere: `certificates` is it, first, with its chain."""
    certificate, *between = certificates
    found = Findings()
    if public_bytes(key.public_key()) != public_bytes(certificate.public_key()):
        found.problems.append(
            "The key in pki_key_file is not that of the first certificate in pki_certificate_file, "
            f"{name_of(certificate)}. The host's own certificate stands first in that file."
        )
    if not is_for(certificate, host):
        found.problems.append(
            f"The certificate in pki_certificate_file, {name_of(certificate)}, is not for {host}: "
            "its subject alternative names must include the host's name in the inventory."
        )
    for purpose in missing_purposes(certificate):
        found.problems.append(
            f"The certificate in pki_certificate_file may not be used by {purpose}. Hosts are both "
            "servers and clients: have it issued for both."
        )
    path = path_to_root(certificate, between, trusted)
    if path is None:
        found.problems.append(
            "No chain leads from the certificate in pki_certificate_file, issued by "
            f"{certificate.issuer.rfc4514_string()}, to a self-signed authority in pki_ca_file. "
            "What stands between them belongs behind the certificate in pki_certificate_file."
        )
    time = check_time("pki_certificate_file", [certificate, *(path or [])], warn_days, now)
    found.problems += time.problems
    found.warnings += [f"{text} Bring a new one for {host} before." for text in time.warnings]
    found.result = {
        "certificate": pem([certificate]),
        "chain": pem(issuer for issuer in path or [] if not is_root(issuer)),
    }
    return found


def check_authority(
    certificates: Certificates, key: Any, trusted: Certificates, warn_days: int, now: datetime
) -> Findings:
    """Check an authority: `certificates` is its own, first, with those that it was signed with."""
    authority, *between = certificates
    found = Findings()
    if public_bytes(key.public_key()) != public_bytes(authority.public_key()):
        found.problems.append(
            "The key in pki_authority_key_file is not that of the first certificate in "
            f"pki_authority_certificate_file, {name_of(authority)}."
        )
    if not is_authority(authority):
        found.problems.append(
            f"The first certificate in pki_authority_certificate_file, {name_of(authority)}, may "
            "not sign others: it is no authority's."
        )
    path = path_to_root(authority, between, trusted)
    if path is None:
        found.problems.append(
            "No chain leads from the first certificate in pki_authority_certificate_file, "
            f"{name_of(authority)}, to a self-signed one. Append those that it was signed with."
        )
    whole = [authority, *(path or [])]
    time = check_time("pki_authority_certificate_file", whole, warn_days, now)
    found.problems += time.problems
    found.warnings += [
        f"{text} No certificate outlives its authority: change to a new one before, as "
        "docs/security.md tells."
        for text in time.warnings
    ]
    found.result = {
        "chain": pem(certificate for certificate in whole if not is_root(certificate)),
        "end": min(certificate.not_valid_after_utc for certificate in whole),
    }
    return found


def is_due(current: str, renew_before: timedelta, new_end: datetime, now: datetime) -> bool:
    """Tell whether a new certificate, which would end at `new_end`, is better than the current."""
    try:
        end = x509.load_pem_x509_certificate(current.encode()).not_valid_after_utc
    except ValueError:
        return True
    # At an authority's end, a new certificate would end when the current one does.
    return end < now + renew_before and end < new_end


def is_as_asked(
    certificate: x509.Certificate, host: str, names: Iterable[str], authority: x509.Certificate
) -> bool:
    """Tell whether a certificate is what this role would have the authority sign for a host.

    It is what `tasks/issued.yml` asks for. Whatever is in doubt is not as asked.
    """
    subject = [(part.oid, part.value) for part in certificate.subject]
    wanted: dict[Any, tuple[bool, Any]] = {
        x509.SubjectAlternativeName: (False, {general_name(name) for name in names}),
        x509.BasicConstraints: (True, x509.BasicConstraints(ca=False, path_length=None)),
        x509.KeyUsage: (True, SIGNS_ALONE),
        x509.ExtendedKeyUsage: (
            False,
            {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH},
        ),
    }
    try:
        has = {
            type(extension.value): (extension.critical, comparable(extension.value))
            for extension in certificate.extensions
        }
    except ValueError:
        return False
    key = certificate.public_key()
    return (
        subject == [(NameOID.COMMON_NAME, host)]
        and all(has.get(kind) == value for kind, value in wanted.items())
        and isinstance(key, ec.EllipticCurvePublicKey)
        and isinstance(key.curve, ec.SECP256R1)
        and issued_by(certificate, authority)
        and key_identifier(certificate) == own_key_identifier(authority)
    )


def key_identifier(certificate: x509.Certificate) -> bytes | None:
    """Return how a certificate names the key that signed it; None where it does not."""
    try:
        return certificate.extensions.get_extension_for_class(
            x509.AuthorityKeyIdentifier
        ).value.key_identifier
    except x509.ExtensionNotFound:
        return None


def own_key_identifier(authority: x509.Certificate) -> bytes:
    """Return how an authority names its own key, or how others do where it has no name for it."""
    try:
        found = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        found = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    return found.digest


def general_name(name: str) -> x509.GeneralName:
    """Return a host name or an address as a certificate holds it."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def comparable(value: x509.ExtensionType) -> Any:
    """Return what an extension says, whatever the order in which it says it."""
    if isinstance(value, (x509.SubjectAlternativeName, x509.ExtendedKeyUsage)):
        return set(value)
    return value.public_bytes() if isinstance(value, x509.KeyUsage) else value


def has_all(has: dict[str, Any], certificate: str, trusted: str, key: bytes) -> bool:
    """Tell whether a host has this certificate with its chain, these authorities, and the key."""
    try:
        own = serialization.load_pem_public_key(has["public_key"].encode())
    except ValueError:
        return False
    return bool(
        has["in_order"]
        and has["certificate"] == certificate
        and has["trusted"] == trusted
        and public_bytes(own) == key
    )


def is_sound(
    has: dict[str, Any],
    host: str,
    names: Iterable[str],
    authority: x509.Certificate,
    result: dict[str, Any],
) -> bool:
    """Tell whether the certificate that a host has can stay, with all that is beside it."""
    try:
        current = x509.load_pem_x509_certificate(has["certificate"].encode())
    except ValueError:
        return False
    return (
        not result["renew"]
        and is_as_asked(current, host, names, authority)
        and has_all(
            has,
            pem([current]) + result["chain"],
            result["trusted"],
            public_bytes(current.public_key()),
        )
    )


def open_to_others(path: str) -> bool:
    """Tell whether others than its owner may read or change a file."""
    return bool(Path(path).stat().st_mode & 0o077)


def look(parameters: dict[str, Any], now: datetime) -> Findings:
    """Check what the parameters name. Raises ValueError and OSError where nothing can be read."""
    extra = [
        certificate
        for path in parameters["trusted_files"]
        for certificate in read_certificates(Path(path).read_text(), path)
    ]
    warn_days = parameters["warn_before_days"]
    if parameters["brought"]:
        certificates = read_certificates(parameters["certificate"], "pki_certificate_file")
        key = read_key(parameters["key"], parameters["key_passphrase"], "pki_key_file")
        own = read_certificates(parameters["ca"], "pki_ca_file")
        found = check_brought(parameters["host"], certificates, key, own, warn_days, now)
        result = found.result
        result["trusted"] = pem([*own, *extra])
        result["sound"] = has_all(
            parameters["has"],
            result["certificate"] + result["chain"],
            result["trusted"],
            public_bytes(key.public_key()),
        )
        return found

    key_file = parameters["authority_key_file"]
    text = Path(parameters["authority_certificate_file"]).read_text()
    certificates = read_certificates(text, "pki_authority_certificate_file")
    key = read_key(
        Path(key_file).read_text(),
        parameters["authority_key_passphrase"],
        "pki_authority_key_file",
    )
    own = [certificate for certificate in certificates if is_root(certificate)]
    found = check_authority(certificates, key, [*own, *extra], warn_days, now)
    if open_to_others(key_file):
        found.problems.append(
            f"Others than its owner may read the authority's key: chmod 600 {key_file}"
        )
    end = min(now + timedelta(days=parameters["valid_days"]), found.result.pop("end"))
    renew_before = timedelta(days=parameters["renew_before_days"])
    found.result |= {
        "trusted": pem([*own, *extra]),
        "not_after": f"{end:%Y%m%d%H%M%SZ}",
        "renew": is_due(parameters["has"]["certificate"], renew_before, end, now),
    }
    found.result["sound"] = is_sound(
        parameters["has"], parameters["host"], parameters["names"], certificates[0], found.result
    )
    return found


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "host": {"type": "str", "required": True},
            "brought": {"type": "bool", "required": True},
            "certificate": {"type": "str"},
            "key": {"type": "str", "no_log": True},
            "key_passphrase": {"type": "str", "no_log": True},
            "ca": {"type": "str"},
            "authority_certificate_file": {"type": "path"},
            "authority_key_file": {"type": "path", "no_log": False},
            "authority_key_passphrase": {"type": "str", "no_log": True},
            "trusted_files": {"type": "list", "elements": "path", "default": []},
            "names": {"type": "list", "elements": "str", "default": []},
            "has": {"type": "dict", "required": True},
            "valid_days": {"type": "int", "required": True},
            "renew_before_days": {"type": "int", "required": True},
            "warn_before_days": {"type": "int", "required": True},
        },
        required_if=[
            ("brought", True, ("certificate", "key", "ca")),
            ("brought", False, ("authority_certificate_file", "authority_key_file")),
        ],
        supports_check_mode=True,
    )
    try:
        found = look(module.params, datetime.now(UTC))
    except (ValueError, OSError) as error:
        module.fail_json(msg=str(error))
    for warning in found.warnings:
        module.warn(warning)
    if found.problems:
        module.fail_json(msg=" ".join(found.problems))
    module.exit_json(changed=False, **found.result)


if __name__ == "__main__":
    main()
