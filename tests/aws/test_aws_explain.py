"""What AWS answers becomes an error that says what happened, which right lacks, what was kept, and what to do."""

from __future__ import annotations

import pytest
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
    SSOTokenLoadError,
    TokenRetrievalError,
)

from burst_dask import errors
from burst_dask.aws.explain import code_of, explained


def answer(code, message=""):
    return ClientError({"Error": {"Code": code, "Message": message}}, "RunTask")


def raised(error, action="ecs:RunTask", resource="", kept="No task was started"):
    with pytest.raises(Exception) as caught, explained(action, resource, kept):
        raise error
    return caught.value


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (answer("ExpiredTokenException"), errors.CredentialsExpired, "the AWS credentials have expired (ecs:RunTask)"),
        (answer("RequestExpired"), errors.CredentialsExpired, "`aws sso login`"),
        (answer("UnrecognizedClientException"), errors.CredentialsMissing, "AWS does not know these credentials"),
        (answer("InvalidClientTokenId"), errors.CredentialsMissing, "AWS_PROFILE"),
        (answer("InvalidSignatureException", "skewed"), errors.CloudError, "Set this machine's clock"),
        (answer("AccessDeniedException"), errors.AccessDenied, "you lack the right ecs:RunTask"),
        (answer("UnauthorizedOperation"), errors.AccessDenied, "ask an administrator to"),
        (answer("403"), errors.AccessDenied, "you lack the right ecs:RunTask"),
        (answer("ThrottlingException"), errors.CloudUnavailable, "AWS throttles ecs:RunTask, also after retries"),
        (answer("RequestLimitExceeded"), errors.CloudUnavailable, "Try again in a minute"),
        (answer("ServerException", "busy"), errors.CloudUnavailable, "ServerException: busy"),
        (answer("VcpuLimitExceeded", "6 vCPU"), errors.CloudLimit, "6 vCPU. No task was started. `burst doctor aws`"),
        (
            answer("Strange", "so it is."),
            errors.CloudError,
            "ecs:RunTask failed: Strange: so it is. No task was started",
        ),
        (NoCredentialsError(), errors.CredentialsMissing, "no AWS credentials found"),
        (SSOTokenLoadError(error_msg="x"), errors.CredentialsExpired, "Run `aws sso login`"),
        (TokenRetrievalError(provider="sso", error_msg="x"), errors.CredentialsExpired, "Run `aws sso login`"),
        (EndpointConnectionError(endpoint_url="https://x"), errors.CloudUnavailable, "AWS cannot be reached"),
        (
            ConnectTimeoutError(endpoint_url="https://x"),
            errors.CloudUnavailable,
            "Check the network, the proxy and the region",
        ),
        (ParamValidationError(report="bad"), errors.CloudError, "ecs:RunTask failed"),
    ],
)
def test_each_answer_in_words(error, kind, said):
    found = raised(error)
    assert type(found) is kind and said in str(found) and "No task was started" in str(found)
    assert isinstance(found, errors.FleetError) and found.__cause__ is error


def test_the_right_that_aws_names_counts():
    message = (
        "User: arn:aws:iam::1:user/me is not authorized to perform: iam:PassRole on resource: arn:aws:iam::1:role/x "
        "because no identity-based policy allows the iam:PassRole action"
    )
    found = raised(answer("AccessDeniedException", message))
    assert found.action == "iam:PassRole"
    assert str(found) == (
        "you lack the right iam:PassRole on arn:aws:iam::1:role/x (because no identity-based policy allows the "
        "iam:PassRole action), which ecs:RunTask needs. No task was started. Add it to the policy of "
        "arn:aws:iam::1:user/me, or ask an administrator to"
    )


def test_an_explicit_deny_is_told():
    found = raised(
        answer("AccessDenied", "is not authorized to perform: ecs:RunTask with an explicit deny in a policy")
    )
    assert "(with an explicit deny in a policy)" in str(found)


def test_a_page_of_a_proxy_is_not_shown():
    assert "html" not in str(raised(answer("502", "Bad gateway <html><body>x</body></html>")))


def test_other_errors_pass():
    assert type(raised(ValueError("x"))) is ValueError
    assert type(raised(errors.ConfigError("x"))) is errors.ConfigError


def test_the_code_is_found_again():
    error = answer("NoSuchEntity")
    assert code_of(error) == code_of(raised(error)) == "NoSuchEntity"
    assert code_of(ValueError()) == ""
