"""Keys of signed sessions in AWS Secrets Manager: one secret for each session, which the stack's workers may read."""

from __future__ import annotations

import re
import warnings

from burst_dask.aws.clients import Clients
from burst_dask.aws.explain import code_of, explained
from burst_dask.aws.stack import SESSION_TAG, STACK_TAG
from burst_dask.errors import CloudError, CloudUnavailable

#: What a reference to a secret begins with; region and name follow.
SCHEME = "secretsmanager:"
#: Below the name of a stack: keys of sessions whose workers share a role, and of those with a role of their own.
_SHARED, _ISOLATED = "session", "isolated"
#: Names only, no ARNs: a key lies in the account of whoever asks.
_NAME = re.compile(rf"[\w.-]+/(?:{_SHARED}|{_ISOLATED})/(?P<session>[\w-]+)")


def secret_name(stack: str, session: str, isolated: bool = False) -> str:
    """Return the name of the secret with a session's key.

    >>> secret_name("burst-dask", "k3w9x2mq"), secret_name("burst-dask", "k3w9x2mq", isolated=True)
    ('burst-dask/session/k3w9x2mq', 'burst-dask/isolated/k3w9x2mq')
    """
    return f"{stack}/{_ISOLATED if isolated else _SHARED}/{session}"


def is_shared(reference: str) -> bool:
    """Tell whether a secret is one that all workers of its stack may read.

    >>> is_shared("secretsmanager:eu-west-1:burst-dask/session/k3w9x2mq"), is_shared("file")
    (True, False)
    """
    return reference.startswith(SCHEME) and f"/{_SHARED}/" in reference


def reference(region: str, name: str) -> str:
    """Return what names a secret in manifests and environments.

    >>> reference("eu-west-1", "burst-dask/session/k3w9x2mq")
    'secretsmanager:eu-west-1:burst-dask/session/k3w9x2mq'
    """
    return f"{SCHEME}{region}:{name}"


def place_of(reference: str, session: str) -> tuple[str, str] | None:
    """Return region and name of the secret that a reference names; None if it cannot have that session's key.

    >>> place_of("secretsmanager:eu-west-1:burst-dask/session/k3w9x2mq", "k3w9x2mq")
    ('eu-west-1', 'burst-dask/session/k3w9x2mq')
    >>> place_of("secretsmanager:eu-west-1:burst-dask/session/another", "k3w9x2mq") is None
    True
    """
    region, _, name = reference.removeprefix(SCHEME).partition(":")
    named = _NAME.fullmatch(name)
    return (region, name) if named is not None and named["session"] == session else None


def create(clients: Clients, name: str, secret: bytes) -> None:
    """Make a secret, with the tags by which it is known whose it is.

    Raises
    ------
    CloudError
        AWS refuses; nothing is left, or a warning names what is.
    """
    stack, _, session = name.split("/")
    tags = {STACK_TAG: stack, SESSION_TAG: session}
    try:
        with explained("secretsmanager:CreateSecret", name, "Nothing was started"):
            clients.client("secretsmanager").create_secret(
                Name=name,
                SecretBinary=secret,
                Description="The key by which records of a session of burst_dask are signed",
                Tags=[{"Key": key, "Value": value} for key, value in tags.items()],
            )
    except BaseException as error:
        if isinstance(error, CloudUnavailable) or not isinstance(error, CloudError):  # an answer may be lost
            _give_up(clients, name)
        raise


def _give_up(clients: Clients, name: str) -> None:
    """Delete a secret that may have been made; that it is left is a warning, and does not hide why."""
    try:
        delete(clients, name)
    except CloudError as error:
        warnings.warn(f"the secret {name} may be left: {error}", stacklevel=3)


def read(clients: Clients, name: str) -> bytes | None:
    """Return a secret, or None when there is none."""
    try:
        with explained("secretsmanager:GetSecretValue", name, "Nothing was read"):
            found = clients.client("secretsmanager").get_secret_value(SecretId=name)
    except CloudError as error:
        if code_of(error) == "ResourceNotFoundException":
            return None
        raise
    return bytes(found.get("SecretBinary", b""))


def delete(clients: Clients, name: str) -> None:
    """Delete a secret for good; one that is not there is no error."""
    try:
        with explained("secretsmanager:DeleteSecret", name, "It costs 0.40 USD a month until it is deleted"):
            clients.client("secretsmanager").delete_secret(SecretId=name, ForceDeleteWithoutRecovery=True)
    except CloudError as error:
        if code_of(error) != "ResourceNotFoundException":
            raise


def of_stack(clients: Clients, stack: str) -> list[str]:
    """Return the names of all secrets with keys of a stack's sessions."""
    prefixes = [secret_name(stack, "", isolated) for isolated in (False, True)]
    with explained("secretsmanager:ListSecrets", f"keys of sessions of the stack {stack}", "Nothing was removed"):
        pages = clients.client("secretsmanager").get_paginator("list_secrets")
        found = [
            one for page in pages.paginate(Filters=[{"Key": "name", "Values": prefixes}]) for one in page["SecretList"]
        ]
    return [
        str(one["Name"])
        for one in found
        if one["Name"].startswith(tuple(prefixes))
        and {"Key": STACK_TAG, "Value": stack} in [{"Key": t["Key"], "Value": t["Value"]} for t in one.get("Tags", ())]
    ]
