"""Keys of signed sessions in AWS Secrets Manager: made, read and deleted, and what is said when that is refused."""

from __future__ import annotations

import pytest

from burst_dask.aws import secrets
from burst_dask.clock import Entropy
from burst_dask.errors import AccessDenied, CloudError, CloudUnavailable, CredentialsExpired, KeyMissing
from burst_dask.trust.keyring import Keyring

SESSION = "k3w9x2mq"
SECRET = secrets.reference("us-east-1", secrets.secret_name("burst-dask", SESSION))


@pytest.fixture
def cloud(account, tmp_path):
    """A keyring of an AWS account, and that."""
    return Keyring(tmp_path / "keys", clients=lambda region: account.clients), account


def test_a_secret_is_made_read_and_deleted(cloud):
    ring, account = cloud
    key = ring.make(SESSION, SECRET, Entropy())
    client = account.clients.client("secretsmanager")
    described = client.describe_secret(SecretId="burst-dask/session/k3w9x2mq")
    tags = {tag["Key"]: tag["Value"] for tag in described["Tags"]}
    assert tags == {"burst-dask:stack": "burst-dask", "burst-dask:session": SESSION}
    assert ring.read(SESSION, SECRET) == key
    ring.forget(SESSION, SECRET)
    assert client.list_secrets()["SecretList"] == []
    assert account.asked("secretsmanager:DeleteSecret")[0]["ForceDeleteWithoutRecovery"] is True
    with pytest.raises(KeyMissing, match=r"there is no secret burst-dask/session/k3w9x2mq in us-east-1"):
        Keyring(clients=lambda region: account.clients).read(SESSION, SECRET)
    ring.forget(SESSION, SECRET)


def test_the_machine_that_opened_a_session_remembers_where_its_key_is(cloud, tmp_path):
    ring, _ = cloud
    key = ring.make(SESSION, SECRET, Entropy())
    assert ring.known(SESSION) == SECRET
    assert key.secret.hex() not in (tmp_path / "keys" / SESSION).read_text()
    ring.forget(SESSION, SECRET)
    assert ring.known(SESSION) == ""


def test_rights_that_are_missing_are_named(cloud):
    ring, account = cloud
    account.denies("secretsmanager:CreateSecret")
    with pytest.raises(AccessDenied, match=r"lack the right secretsmanager:CreateSecret .* Nothing was started"):
        ring.make(SESSION, SECRET, Entropy())
    account.allows("secretsmanager:CreateSecret")
    ring.make(SESSION, SECRET, Entropy())
    account.denies("secretsmanager:GetSecretValue")
    with pytest.raises(KeyMissing, match=r"is signed, .* you lack the right secretsmanager:GetSecretValue"):
        ring.read(SESSION, SECRET)
    account.denies("secretsmanager:DeleteSecret")
    with pytest.raises(AccessDenied, match=r"secretsmanager:DeleteSecret .* 0.40 USD a month until it is deleted"):
        ring.forget(SESSION, SECRET)


def test_a_secret_whose_making_was_not_answered_is_deleted(cloud):
    """It would cost for ever: no session is there to delete it with."""
    ring, account = cloud
    client = account.clients.client("secretsmanager")

    def lost(asked):
        account.allows("secretsmanager:CreateSecret")
        client.create_secret(**asked)
        raise CloudUnavailable("the connection broke")

    account.answers("secretsmanager:CreateSecret", lost)
    with pytest.raises(CloudUnavailable):
        ring.make(SESSION, SECRET, Entropy())
    assert client.list_secrets()["SecretList"] == []
    account.answers("secretsmanager:CreateSecret", lost)
    account.denies("secretsmanager:DeleteSecret")
    with (
        pytest.raises(CloudUnavailable),
        pytest.warns(UserWarning, match="the secret burst-dask/session/k3w9x2mq may be left"),
    ):
        ring.make(SESSION, SECRET, Entropy())


def test_what_may_pass_is_not_taken_for_a_missing_key(cloud):
    ring, account = cloud
    for code, kind in (("ExpiredTokenException", CredentialsExpired), ("InternalError", CloudError)):
        account.fails("secretsmanager:GetSecretValue", code)
        with pytest.raises(kind):
            ring.read(SESSION, SECRET)
