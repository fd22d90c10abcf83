"""Keys and certificates of the hosts."""

import re
from typing import Any

import pytest
from testinfra.host import Host

# Only hosts on which this variable is true.
VARIABLE = "pki_enabled"


@pytest.fixture
def folder(variables: dict[str, Any]) -> str:
    return str(variables.get("pki_dir", "/etc/ssl/iot-pipeline"))


def names(node: Any) -> set[str]:
    """What the certificate must be for."""
    known = node.variables
    if known.get("pki_certificate_file"):
        return {node.name}
    return {node.name, known.get("ansible_host", node.name), "localhost", "127.0.0.1"}


def test_files_have_their_owners_and_modes(host: Host, folder: str) -> None:
    listed = host.check_output("find %s -printf '%%f %%u:%%g %%m\\n'", folder)
    seen = {name: (owner, mode) for name, owner, mode in map(str.split, listed.splitlines())}
    assert seen == {
        folder.rpartition("/")[2]: ("root:root", "755"),
        "ca.pem": ("root:root", "644"),
        "host.pem": ("root:root", "644"),
        "host.key": ("root:ssl-cert", "640"),
    }


def test_key_is_plain_pkcs8(host: Host, folder: str) -> None:
    # Its first line alone: a key is not to stand in a test's output.
    assert host.check_output("head -n 1 %s", f"{folder}/host.key") == "-----BEGIN PRIVATE KEY-----"


def test_key_is_the_certificates(host: Host, folder: str) -> None:
    of_key = host.check_output("openssl pkey -in %s -pubout", f"{folder}/host.key")
    of_certificate = host.check_output("openssl x509 -in %s -noout -pubkey", f"{folder}/host.pem")
    assert "BEGIN PUBLIC KEY" in of_key
    assert of_key == of_certificate


@pytest.mark.parametrize("purpose", ["sslserver", "sslclient"])
def test_chain_verifies(host: Host, folder: str, purpose: str) -> None:
    verified = host.run(
        "openssl verify -x509_strict -no-CApath -no-CAstore "
        "-CAfile %s -untrusted %s -purpose %s %s",
        f"{folder}/ca.pem",
        f"{folder}/host.pem",
        purpose,
        f"{folder}/host.pem",
    )
    assert verified.rc == 0, verified.stdout + verified.stderr


def test_no_other_authority_vouches_for_it(host: Host, folder: str) -> None:
    """The test before would pass too if openssl trusted more than it was told."""
    refused = host.run(
        "openssl verify -no-CApath -no-CAstore -untrusted %s %s",
        f"{folder}/host.pem",
        f"{folder}/host.pem",
    )
    assert refused.rc != 0


def test_certificate_is_for_the_host(host: Host, node: Any, folder: str) -> None:
    for name in names(node):
        option = "-checkip" if re.fullmatch(r"[\d.]+|.*:.*", name) else "-checkhost"
        said = host.check_output(
            f"openssl x509 -in %s -noout {option} %s", f"{folder}/host.pem", name
        )
        assert said.endswith("does match certificate"), name
    # Its exit status says so only since OpenSSL 3.5.
    said = host.run("openssl x509 -in %s -noout -checkhost stranger.invalid", f"{folder}/host.pem")
    assert said.stdout.strip().endswith("does NOT match certificate")


def test_common_name_is_the_hosts(host: Host, node: Any, folder: str) -> None:
    if node.variables.get("pki_certificate_file"):
        pytest.skip("the certificate comes from elsewhere, with a name of its own")
    subject = host.check_output(
        "openssl x509 -in %s -noout -subject -nameopt multiline", f"{folder}/host.pem"
    )
    assert re.findall(r"commonName\s*= (.*)", subject) == [node.name]


def test_certificate_is_not_due(host: Host, folder: str, variables: dict[str, Any]) -> None:
    days = variables.get("pki_renew_before_days", 30)
    for path in ("host.pem", "ca.pem"):
        lasting = host.run(
            "openssl x509 -in %s -noout -checkend %s", f"{folder}/{path}", str(days * 86400)
        )
        assert lasting.rc == 0, f"{path}: {lasting.stdout}"


def test_no_host_holds_an_authoritys_key(host: Host, folder: str) -> None:
    """Every private key on the host is compared with every authority that it trusts."""
    authorities = {
        host.check_output("printf %%s %s | openssl x509 -noout -pubkey", certificate)
        for certificate in re.findall(
            "-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----",
            host.file(f"{folder}/ca.pem").content_string,
            re.DOTALL,
        )
    }
    assert authorities
    keys = host.check_output(
        "find /etc /home /opt /root /srv /tmp /usr/local /var -xdev -type f -size -64k "
        "-exec grep --files-with-matches --text --extended-regexp "
        "-e '-----BEGIN ([A-Z]+ )*PRIVATE KEY-----' {} + 2>/dev/null || true"
    ).splitlines()
    # The search finds what is there.
    assert f"{folder}/host.key" in keys
    for path in keys:
        public = host.run("openssl pkey -in %s -pubout -passin pass:", path)
        assert public.stdout.strip() not in authorities, path
    assert not [path for path in keys if path.endswith("/ca.key")]
