"""What AWS answers, in the words of `burst_dask.errors`: which right is missing, what was kept, what to do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from burst_dask.errors import (
    AccessDenied,
    BurstError,
    CloudError,
    CloudLimit,
    CloudUnavailable,
    CredentialsExpired,
    CredentialsMissing,
)

LOGIN = (
    "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure` or `aws sso login`; "
    "a container or an instance needs a role"
)
#: What AWS itself says of a refusal; the last part is there when it may be known.
_REFUSED = re.compile(
    r"(?:User: (?P<who>\S+) is )?not authorized to perform:? (?P<action>[\w-]+:\w+)"
    r"(?: on (?:the )?resource:? (?P<resource>\S+))?",
)
_BECAUSE = re.compile(r"(because no [\w-]+ policy allows[^.]*|with an explicit deny[^.]*)")
_DENIED = {
    "AccessDenied",
    "AccessDeniedException",
    "AuthorizationError",
    "Client.UnauthorizedOperation",
    "NotAuthorized",
    "OptInRequired",
    "UnauthorizedOperation",
    "403",
    "Forbidden",
}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_UNKNOWN = {
    "AuthFailure",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidToken",
    "MissingAuthenticationToken",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
}
_CLOCK = {"RequestTimeTooSkewed", "InvalidSignatureException"}
_THROTTLED = re.compile(r"Throttl|TooManyRequests|RequestLimitExceeded|SlowDown|BandwidthLimit|ProvisionedThroughput")
_BUSY = {"InternalError", "InternalFailure", "ServerException", "ServiceUnavailable", "Unavailable", "500", "503"}
_LIMIT = re.compile(r"LimitExceeded|QuotaExceeded|VcpuLimit|MaxSpotInstanceCount|InsufficientFreeAddresses")
#: Errors of botocore by the name of their class, so that this module loads without it.
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}
_LOGGED_OUT = {"SSOTokenLoadError", "UnauthorizedSSOTokenError", "TokenRetrievalError", "LoginRefreshRequired"}
_UNREACHABLE = {
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ConnectionClosedError",
    "ConnectionError",
    "HTTPClientError",
    "NewConnectionError",
    "ProxyConnectionError",
    "SSLError",
}


@contextlib.contextmanager
def explained(action: str, resource: str = "", kept: str = "") -> Iterator[None]:
    """Raise what AWS answers to `action` as an error of our own.

    Parameters
    ----------
    action
        The right that the call needs, as IAM writes it: ``ecs:RunTask``.
    resource
        On what, for people: an ARN or a name.
    kept
        What of earlier steps is still there, for the message: ``"Nothing was changed"``.

    Raises
    ------
    AccessDenied, CredentialsMissing, CredentialsExpired, CloudUnavailable, CloudLimit, CloudError
        From the original error, which is its ``__cause__``.

    Examples
    --------
    >>> from botocore.exceptions import ClientError
    >>> with explained("ecs:RunTask", "the cluster burst-dask", "No task was started"):
    ...     raise ClientError({"Error": {"Code": "AccessDeniedException", "Message": "no"}}, "RunTask")
    Traceback (most recent call last):
    ...
    burst_dask.errors.AccessDenied: you lack the right ecs:RunTask on the cluster burst-dask. No task was started. Add \
it to the policy of whoever you are (`aws sts get-caller-identity` tells), or ask an administrator to
    """
    try:
        yield
    except BurstError:
        raise
    except Exception as error:
        found = translate(error, action, resource, kept)
        if found is None:
            raise
        raise found from error


def translate(error: Exception, action: str, resource: str = "", kept: str = "") -> CloudError | None:
    """Return the error to raise for `error`; None if it is not one of boto3."""
    response = getattr(error, "response", None)
    if isinstance(response, dict) and "Error" in response:
        return _of_answer(response, action, resource, kept)
    return _of_botocore(error, action, kept)


def code_of(error: BaseException) -> str:
    """Return the code that AWS gave an error, also of one that `explained` has raised; empty if there is none."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def is_throttled(code: str) -> bool:
    """Tell whether a code only says that calls came too fast."""
    return _THROTTLED.search(code) is not None


def denied_in(message: str, action: str, kept: str = "") -> AccessDenied | None:
    """Return the error for a refusal that is told in a text, such as the reason of an event; None if it tells none."""
    return _denied(message, action, "", kept) if _REFUSED.search(message) else None


def sentence(*parts: str) -> str:
    """Return what there is of `parts`, each as a sentence of its own.

    >>> sentence("it failed", "", "Nothing was changed.")
    'it failed. Nothing was changed'
    """
    return ". ".join(part.rstrip(". ") for part in parts if part)


def _of_answer(response: dict[str, Any], action: str, resource: str, kept: str) -> CloudError:
    """Return the error for an answer of AWS that is one."""
    code = str(response["Error"].get("Code", ""))
    message = _brief(str(response["Error"].get("Message", "")))
    if found := _of_identity(code, message, action, kept):
        return found
    if code in _DENIED or _REFUSED.search(message):
        return _denied(message, action, resource, kept)
    if is_throttled(code):
        return CloudUnavailable(
            sentence(f"AWS throttles {action}, also after retries ({code})", kept, "Try again in a minute")
        )
    if code in _BUSY:
        return CloudUnavailable(sentence(f"AWS did not do {action}: {code}: {message}", kept, "Try again later"))
    if _LIMIT.search(code):
        return CloudLimit(
            sentence(
                f"a limit of the account is reached ({action}): {code}: {message}",
                kept,
                "`burst doctor aws` shows the quotas; ask for more in the console under Service Quotas",
            )
        )
    what = f"{action} on {resource}" if resource else action
    return CloudError(sentence(f"{what} failed: {code}: {message}", kept))


def _of_identity(code: str, message: str, action: str, kept: str) -> CloudError | None:
    """Return the error if AWS does not believe who asks."""
    if code in _EXPIRED or "token included in the request is expired" in message:
        return CredentialsExpired(
            sentence(
                f"the AWS credentials have expired ({action})",
                kept,
                "Renew them, for example by `aws sso login`, and try again. What workers have committed is kept",
            )
        )
    if code in _UNKNOWN:
        return CredentialsMissing(sentence(f"AWS does not know these credentials ({action}: {code})", kept, LOGIN))
    if code in _CLOCK:
        return CloudError(sentence(f"AWS refused a signature ({action}): {message}", kept, "Set this machine's clock"))
    return None


def _denied(message: str, action: str, resource: str, kept: str) -> AccessDenied:
    """Return the error for a refusal. AWS may name another right than the one asked for, such as iam:PassRole."""
    said = _REFUSED.search(message)
    right = said.group("action") if said else action
    where = (said.group("resource") if said else None) or resource
    who = said.group("who") if said else None
    whose = who or "whoever you are (`aws sts get-caller-identity` tells)"
    because = _BECAUSE.search(message)
    error = AccessDenied(
        sentence(
            f"you lack the right {right}"
            + (f" on {where.rstrip('.')}" if where else "")
            + (f" ({because.group(1)})" if because else "")
            + (f", which {action} needs" if right != action else ""),
            kept,
            f"Add it to the policy of {whose}, or ask an administrator to",
        )
    )
    error.action = right
    return error


def _of_botocore(error: Exception, action: str, kept: str) -> CloudError | None:
    """Return the error for what botocore raises without an answer of AWS; None for anything else."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if not any(kind.__module__.startswith("botocore") for kind in type(error).__mro__):
        return None
    if names & _LOGGED_OUT or "SSO" in type(error).__name__:
        return CredentialsExpired(
            sentence(f"the login has expired ({action}): {error}", kept, "Run `aws sso login`, and try again")
        )
    if names & _NO_CREDENTIALS:
        return CredentialsMissing(sentence(f"no AWS credentials found ({action}: {error})", kept, LOGIN))
    if names & _UNREACHABLE:
        return CloudUnavailable(
            sentence(f"AWS cannot be reached ({action}): {error}", kept, "Check the network, the proxy and the region")
        )
    return CloudError(sentence(f"{action} failed: {_brief(str(error))}", kept))


def _brief(message: str) -> str:
    """Return a message as one line, without the page that a proxy or a broken server has sent."""
    return " ".join(message.partition("<!doctype")[0].partition("<html")[0].split())
