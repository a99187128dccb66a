"""What obstore raises, in the words of `burst_dask.errors`.

obstore tells most failures only by the text of one class, so this reads the HTTP status, the
service's error code and the operating system's error number out of it. A message that leaves
here is one line without the query of a URL: a signed one is a secret.
"""

from __future__ import annotations

import errno
import re

from obstore.exceptions import AlreadyExistsError, InvalidPathError, PermissionDeniedError, UnauthenticatedError

from burst_dask.errors import (
    BurstError,
    ConfigError,
    StoreAccessDenied,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreUnavailable,
    StoreUnsuitable,
)

NO_CREDENTIALS = (
    "no credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run "
    "`aws configure` or `aws sso login`; a container or an instance needs a role"
)
_STATUS = re.compile(r"status code: (\d{3}) ")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_ERRNO = re.compile(r"os error (\d+)")
_REASON = re.compile(r"<Message>(.*?)</Message>", re.DOTALL)
_REGION = re.compile(r"<Region>([\w-]+)</Region>|expecting '([\w-]+)'|s3[.-]([a-z]{2}-[\w-]+-\d)\.amazonaws")
#: What botocore raises when a login of SSO is absent or has expired.
_LOGIN = re.compile(r"SSOToken|SSO session|TokenRetrievalError|TokenProvider")
_QUERY = re.compile(r"(https?://[^\s?]+)\?\S*")

_FULL_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: A file system behind a network is away, or has forgotten what was open.
_AWAY_ERRNO = {errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN}
_DENIED_ERRNO = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL = {"XMinioStorageFull", "QuotaExceeded", "XMinioStorageQuotaExceeded"}
_MISSING = {"NoSuchBucket", "ContainerNotFound", "FilesystemNotFound", "ResourceNotFound"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_DENIED = _EXPIRED | {
    "AccessDenied",
    "AllAccessDisabled",
    "AuthenticationFailed",
    "AuthorizationFailure",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
}
_ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_TRANSIENT = {"RequestTimeout", "SlowDown", "ServerBusy", "OperationTimedOut", "InternalError", "TemporaryRedirect"}
#: 409: another conditional write of the key was under way and nothing landed.
_TRANSIENT_STATUS = {408, 409, 425, 429, 500, 502, 503, 504, 529}
#: Where credentials of containers and instances are asked for.
_METADATA = ("169.254.169.254", "169.254.170.2", "169.254.170.23", "fd00:ec2::254", "metadata.google.internal")


def no_such_place(error: Exception) -> bool:
    """Tell whether a 404 means the bucket or container rather than the object."""
    text = str(error)
    return "NoSuchBucket" in text or "ContainerNotFound" in text or "bucket does not exist" in text


def lost_race(error: AlreadyExistsError) -> bool:
    """Tell whether a create really found an object; a bare 409 only met another writer."""
    text = str(error)
    return "409 Conflict" not in text or "BlobAlreadyExists" in text


def translate(error: Exception, doing: str, url: str) -> BurstError:
    """Return the error to raise for what obstore raised while `doing` something at `url`."""
    if isinstance(error, BurstError):
        return error
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:  # of a system call of our own
        text = f"{error.strerror} (os error {error.errno})"  # as obstore tells of its
    code = found.group(1) if (found := _CODE.search(text)) else ""
    return (
        _of_local(text, doing, url)
        or _of_credentials(error, text, code, doing, url)
        or _of_place(text, code, doing, url)
        or _of_answer(error, text, code, doing, url)
    )


def _of_local(text: str, doing: str, url: str) -> BurstError | None:
    """Return the error for an operating system's error number of a local directory."""
    number = int(found.group(1)) if (found := _ERRNO.search(text)) and "HTTP error" not in text else 0
    if number in _FULL_ERRNO:
        return StoreFull(
            number, f"{url} has no space left ({doing}): free some and try again; what was committed is intact"
        )
    if number in _DENIED_ERRNO:
        return StoreAccessDenied(
            number, f"{url} refused {doing}: {brief(text)}; check who owns it and how it is mounted"
        )
    if number in (errno.ENOENT, errno.ENOTDIR):
        return StoreMissing(number, f"{url}: {brief(text)} ({doing})")
    if number in _AWAY_ERRNO:
        return StoreUnavailable(f"{url} is unavailable ({doing}): {brief(text)}; trying again later may help")
    return None


def _of_credentials(error: Exception, text: str, code: str, doing: str, url: str) -> BurstError | None:
    if any(host in text for host in _METADATA) or "CredentialsNotLoaded" in text or "NoCredentialsError" in text:
        return StoreAccessDenied(f"{url}: {NO_CREDENTIALS} ({doing})")
    if code in _EXPIRED or _LOGIN.search(text):
        return StoreAccessDenied(
            f"{url}: the credentials have expired ({doing}); renew them, for example by `aws sso login`, and try "
            "again. Nothing that was committed is lost"
        )
    refused = isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError)
    if refused or code in _DENIED or _status(text) in (401, 403):
        return StoreAccessDenied(
            f"{url} refused {doing}: {_reason(text, code)}; check the credentials and their policy"
        )
    return None


def _of_place(text: str, code: str, doing: str, url: str) -> BurstError | None:
    if code in _ELSEWHERE or "redirect without LOCATION" in text or _status(text) == 301:
        found = _REGION.search(text)
        region = next(filter(None, found.groups())) if found else ""
        hint = (
            f"it is in {region}: open it with region={region!r}"
            if region
            else "open it with region= as `aws s3api head-bucket --bucket …` tells"
        )
        return ConfigError(f"{url} is in another region ({doing}); {hint}")
    if code in _MISSING or "bucket does not exist" in text or _status(text) == 404:
        return StoreMissing(f"{url}: no such bucket or container ({doing}); create it, or correct the address")
    return None


def _of_answer(error: Exception, text: str, code: str, doing: str, url: str) -> BurstError:
    status, reason = _status(text), _reason(text, code)
    if code in _FULL or status == 507:
        return StoreFull(f"{url} has no space left ({doing}); what was committed is intact")
    if status == 501 or "non-partial response" in text:
        return StoreUnsuitable(f"{url} does not support {doing}: {reason}")
    if isinstance(error, InvalidPathError):
        return ConfigError(f"{url}: {doing}: {reason}")
    if code in _TRANSIENT or status in _TRANSIENT_STATUS or _is_transport(text):
        return StoreUnavailable(f"{url} is unavailable ({doing}): {reason}; trying again later may help")
    return StoreError(f"{url}: {doing} failed: {reason}")


def _is_transport(text: str) -> bool:
    """Tell whether the request, or its answer, was lost on the way."""
    return "HTTP error" in text or "error decoding response" in text or "missing from response" in text


def _status(text: str) -> int:
    return int(found.group(1)) if (found := _STATUS.search(text)) else 0


def _reason(text: str, code: str) -> str:
    """Return the service's own words when it gave some."""
    message = found.group(1) if (found := _REASON.search(text)) else ""
    if code:
        return f"{code}: {message}" if message else code
    status = _status(text)
    return f"status {status}" if status else brief(text)


def brief(text: str) -> str:
    """Return the first line of an obstore message, without queries of URLs, plus the cause below it."""
    line = _QUERY.sub(r"\1", text.split("\n", 1)[0]).rstrip()
    cause = re.search(r'message: "([^"]+)"', text)
    if "HTTP error" not in line:
        return line
    if cause and cause.group(1) not in line:
        return f"{line} ({cause.group(1)})"
    return f"{line} (timed out)" if "TimedOut" in text else line
