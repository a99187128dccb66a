"""An account to play with: moto, new for each test; what it cannot do, or is to refuse, is answered here."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import servers
from botocore.exceptions import ClientError
from click.testing import CliRunner, Result

from burst_dask import cli
from burst_dask.aws.clients import Clients

SERVICES = (
    "autoscaling",
    "cloudformation",
    "codebuild",
    "ec2",
    "ecr",
    "ecs",
    "iam",
    "logs",
    "s3",
    "secretsmanager",
    "service-quotas",
    "sts",
)
ME = "arn:aws:iam::123456789012:user/me"


class Account:
    """Clients of an account, what was asked of it, and answers that stand in for its own."""

    def __init__(self, clients: Clients) -> None:
        self.clients = clients
        #: operations in order, as ``"ecs:RunTask"``; with the parameters of each
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._answers: dict[str, Callable[[dict[str, Any]], Any]] = {}
        make, seen = clients.client, set[str]()

        def client(service: str) -> Any:
            made = make(service)
            if service not in seen:
                seen.add(service)
                made.meta.events.register_first("provide-client-params", self._asked)
                made.meta.events.register_first("before-call", self._answer)
            return made

        object.__setattr__(clients, "client", client)

    def renew(self) -> None:
        """Forget what was asked and answered. The clients are kept: making them takes longer than a test."""
        self.calls.clear()
        self._answers.clear()
        self.clients._made.pop("identity", None)

    def answers(self, operation: str, answer: Callable[[dict[str, Any]], Any] | Any) -> None:
        """Have an operation answer so: with a value, with what a function of its parameters returns, or an error."""
        self._answers[operation] = answer if callable(answer) else lambda _: answer

    def fails(self, operation: str, code: str, message: str = "") -> None:
        def fail(_: dict[str, Any]) -> Any:
            raise ClientError({"Error": {"Code": code, "Message": message}}, operation.partition(":")[2])

        self.answers(operation, fail)

    def allows(self, operation: str) -> None:
        """Let the account answer again."""
        self._answers.pop(operation, None)

    def denies(self, operation: str, right: str | None = None) -> None:
        """Refuse an operation, in AWS's words."""
        text = f"User: {ME} is not authorized to perform: {right or operation} on resource: arn:aws:x because no "
        self.fails(operation, "AccessDenied", f"{text}identity-based policy allows the {right or operation} action")

    def asked(self, operation: str) -> list[dict[str, Any]]:
        """Return the parameters of each call of an operation."""
        return [parameters for name, parameters in self.calls if name == operation]

    def sent(self) -> dict[str, str]:
        """Return the parameters of the template that were sent last."""
        return _parameters(self.asked("cloudformation:CreateChangeSet")[-1])

    def has(self) -> dict[str, str]:
        """Return the parameters of the stack that stands."""
        (found,) = self.clients.client("cloudformation").describe_stacks(StackName="burst-dask")["Stacks"]
        return _parameters(found)

    def _asked(self, params: dict[str, Any], model: Any, **_: Any) -> None:
        self.calls.append((_name(model), dict(params)))

    def _answer(self, model: Any, **_: Any) -> Any:
        if (answer := self._answers.get(_name(model))) is None:
            return None
        return SimpleNamespace(status_code=200), {"ResponseMetadata": {"HTTPHeaders": {}}, **answer(self.calls[-1][1])}


def _parameters(told: dict[str, Any]) -> dict[str, str]:
    return {one["ParameterKey"]: one["ParameterValue"] for one in told["Parameters"]}


def _name(model: Any) -> str:
    service = model.service_model
    return f"{service.metadata.get('signingName') or service.endpoint_prefix}:{model.name}"


@pytest.fixture(scope="session")
def account_server(aws_credentials: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A moto server that is reset between tests, which others must not notice."""
    with servers.moto(tmp_path_factory.mktemp("account") / "log") as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def kept_account(account_server: str) -> Account:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", account_server)
        account = Account(Clients.of(servers.REGION))
        for service in [
            "cloudformation",
            "ec2",
            "iam",
            "s3",
            "ecs",
            "ecr",
            "sts",
            "logs",
            "autoscaling",
            "service-quotas",
            "codebuild",
            "secretsmanager",
            "scheduler",
        ]:
            account.clients.client(service)
    return account


@pytest.fixture
def account(kept_account: Account, account_server: str, monkeypatch: pytest.MonkeyPatch) -> Account:
    """An account with nothing in it but a default VPC that has a way to the internet."""
    request = urllib.request.Request(f"{account_server}/moto-api/reset", method="POST")
    urllib.request.urlopen(request).close()
    account = kept_account
    account.renew()
    monkeypatch.setattr(Clients, "of", lambda region=None, profile=None: account.clients)
    ec2 = account.clients.client("ec2")
    (vpc,) = [one["VpcId"] for one in ec2.describe_vpcs()["Vpcs"]]
    gateway = ec2.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
    ec2.attach_internet_gateway(InternetGatewayId=gateway, VpcId=vpc)
    (table,) = [one["RouteTableId"] for one in ec2.describe_route_tables()["RouteTables"]]
    ec2.create_route(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0", GatewayId=gateway)
    # moto knows no quotas of processors and does not simulate policies.
    account.answers("servicequotas:GetServiceQuota", {"Quota": {"Value": 256.0}})
    account.answers("iam:SimulatePrincipalPolicy", {"EvaluationResults": [{"EvalDecision": "allowed"}]})
    # What moto answers, but in seconds.
    account.answers("ec2:DescribeInstanceTypes", {"InstanceTypes": []})
    account.answers("ec2:DescribeSpotPriceHistory", {"SpotPriceHistory": []})
    account.calls.clear()
    return account


@pytest.fixture
def stack(account: Account, burst: Callable[..., Result]) -> Account:
    """The account, in which the stack stands."""
    result = burst("setup", "aws", "--yes")
    assert result.exit_code == 0, result.output
    account.calls.clear()
    return account


@pytest.fixture
def burst(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command; time passes at once."""
    monkeypatch.setattr("burst_dask.clock.SystemClock.sleep", _at_once)

    def invoke(*arguments: str, input: str | None = None) -> Result:
        result = CliRunner().invoke(cli.main, arguments, input=input)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


async def _at_once(self: Any, seconds: float) -> None:
    return None
