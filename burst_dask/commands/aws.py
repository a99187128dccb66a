"""Commands on the stack: setup aws, teardown aws, doctor aws."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import click
import msgspec

from burst_dask.aws import diagnosis, schedule, setup, teardown
from burst_dask.aws.clients import Clients
from burst_dask.aws.events import Event
from burst_dask.aws.image import sources_here
from burst_dask.aws.setup import Plan, Wish
from burst_dask.aws.stack import ARCHITECTURES, DEFAULT_NAME, Stack
from burst_dask.clock import SystemClock

F = TypeVar("F", bound=Callable[..., Any])

#: Options of `setup aws` that are parameters of the template as they are: option, parameter, type, help.
_PARAMETERS: tuple[tuple[str, str, Any, str], ...] = (
    ("--prefix", "Prefix", str, "Workers may write below this prefix of the bucket only."),
    ("--kms-key", "KmsKey", str, "ARN of a KMS key that encrypts the bucket."),
    ("--data-days", "DataDays", click.IntRange(min=0), "Delete session data after so many days; 0 never does."),
    (
        "--heal-every",
        "HealEvery",
        click.IntRange(min=0),
        "Minutes between looks for work that nobody is there for; 0: none.",
    ),
    ("--log-days", "LogDays", int, "Delete logs of workers after so many days."),
    ("--instance-types", "InstanceTypesX86", str, "Instance types of x86 on EC2, such as c7i.*,m7i.2xlarge."),
    ("--instance-types-arm", "InstanceTypesArm", str, "The same of Arm."),
    ("--least-vcpus", "LeastVCpus", click.IntRange(min=1), "Processors of the smallest instance on EC2."),
    ("--most-vcpus", "MostVCpus", click.IntRange(min=1), "Processors of the largest one."),
    ("--most-instances", "MostInstances", click.IntRange(min=0), "Instances of each kind at most."),
    ("--warm", "WarmX86", click.IntRange(min=0), "Stopped x86 instances to keep ready; their disks cost."),
    ("--warm-arm", "WarmArm", click.IntRange(min=0), "The same of Arm."),
)
_DONE = {"Add": "create", "Modify": "change", "Remove": "delete", "Import": "import", "Dynamic": "change"}


def place(function: F) -> F:
    """Add the options that say which stack is meant."""
    for option in (
        click.option(
            "--stack", envvar="BURST_STACK", default=DEFAULT_NAME, show_default=True, help="Name of the stack."
        ),
        click.option("--profile", help="Profile of the AWS configuration; by default AWS_PROFILE."),
        click.option("--region", help="Region of AWS; by default AWS_REGION or that of the profile."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts."),
    ):
        function = option(function)
    return function


def _parameters(function: F) -> F:
    for option, name, kind, text in reversed(_PARAMETERS):
        function = click.option(option, f"p_{name}", type=kind, help=text)(function)
    return function


@click.group(name="setup")
def setup_group() -> None:
    """Set up what workers elsewhere need."""


@click.group(name="teardown")
def teardown_group() -> None:
    """Remove what `burst setup` has made."""


@setup_group.command(name="aws")
@place
@click.option("--vpc", help="VPC that workers run in; by default the default one of the region.")
@click.option("--subnets", help="Subnets, separated by commas; by default one in each zone.")
@click.option("--bucket", help="Bucket of the store; created unless it is there.")
@click.option("--store", "stores", multiple=True, help="Further stores that workers may use; may be repeated.")
@click.option("--private-endpoints/--no-private-endpoints", default=None, help="Workers without a way to the internet.")
@click.option("--self-healing/--no-self-healing", default=None, help="Whether workers may start others; they may.")
@_parameters
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Show what would be done, and do nothing.")
def setup_aws(
    stack: str,
    profile: str | None,
    region: str | None,
    as_json: bool,
    vpc: str | None,
    subnets: str | None,
    bucket: str | None,
    stores: tuple[str, ...],
    yes: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Create or change the stack that workers on AWS need: a bucket, a cluster, roles.

    Shows what it is going to do, and asks. Asked again it changes nothing. While no worker runs, only what is
    stored costs.
    """
    clients, clock = Clients.of(region, profile), SystemClock()
    wish = Wish(vpc, tuple(filter(None, (subnets or "").split(","))), bucket, stores, _options(options))
    if (left := setup.leftover(clients, stack)) is not None:
        _say(f"{left.state}. It is removed, and then created anew", quiet=as_json)
        if dry_run or not (yes or click.confirm("Remove it?", err=as_json)):
            _nothing(as_json, [])
            return
        setup.remove_leftover(clients, left, clock)
    plan = setup.plan(clients, stack, wish, clock)
    if not plan.is_empty:
        _say(_described(plan, clients), quiet=as_json)
        try:
            agreed = not dry_run and (yes or click.confirm("Do it?", err=as_json))
        except click.Abort:  # Ctrl-C must not leave the change set behind either
            setup.drop(clients, plan)
            raise
        if not agreed:
            setup.drop(clients, plan)
            _nothing(as_json, [asdict(change) for change in plan.changes])
            return
    there = setup.stack_of(clients, plan) if plan.is_empty else setup.apply(clients, plan, clock, _teller(as_json))
    if as_json:
        changes = [asdict(change) for change in plan.changes]
        click.echo(json.dumps({"changed": not plan.is_empty, "changes": changes, "stack": msgspec.to_builtins(there)}))
    else:
        click.echo(_next_line(there, plan))


def _nothing(as_json: bool, changes: list[dict[str, Any]]) -> None:
    """Say that nothing was done, of these changes."""
    _say("Nothing was changed", quiet=as_json)
    if as_json:
        click.echo(json.dumps({"changed": False, "changes": changes}))


@teardown_group.command(name="aws")
@place
@click.option("--data", is_flag=True, help="Also delete the bucket, with the data of all sessions.")
@click.option("--stop-tasks", is_flag=True, help="Stop tasks that run, instead of refusing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def teardown_aws(
    stack: str, profile: str | None, region: str | None, as_json: bool, data: bool, stop_tasks: bool, yes: bool
) -> None:
    """Remove the stack with its images and logs. The bucket stays unless --data is given."""
    clients = Clients.of(region, profile)
    removal = teardown.look(clients, stack)
    if removal is None:
        if as_json:
            click.echo(json.dumps({"removed": False, "bucket": None}))
        else:
            click.echo(f"there is no stack {stack} in {clients.region}")
        return
    bucket = removal.stack.bucket
    what = f"the bucket {bucket} with the data of all sessions" if data else f"not the bucket {bucket}"
    _say(f"This removes the stack {stack} in {clients.region} with its images and logs, and {what}.", quiet=as_json)
    if keys := removal.told_keys:
        fate = "" if removal.keys is None else " are deleted, too" if data else f" stay with it, {_KEYS_COST}"
        _say(f"{keys}{fate}.", quiet=as_json)
    if not (yes or click.confirm("Do it?", err=as_json)):
        _say("Nothing was removed", quiet=as_json)
        return
    teardown.remove(clients, removal, SystemClock(), _teller(as_json), data=data, stop=stop_tasks)
    if as_json:
        click.echo(json.dumps({"removed": True, "bucket": None if data else bucket}))
    else:
        kept = "" if data else f"; the bucket {bucket} is kept, and `burst setup aws` finds it again"
        click.echo(f"the stack {stack} is removed{kept}")


@click.command(name="doctor aws")
@place
@click.option("--arch", type=click.Choice(ARCHITECTURES), help="Architecture of the workers to come.")
@click.option("--launch-type", type=click.Choice(["FARGATE", "EC2"]), default="FARGATE", show_default=True)
@click.option("--spot", is_flag=True, help="Whether they are to be on Spot.")
@click.option("--workers", type=click.IntRange(min=0), default=0, help="How many are to run at a time.")
@click.option("--cpu", "cpus", type=float, default=1.0, help="Processors of each.")
@click.option("--store", help="Store that they are to use; by default the stack's own.")
@click.option("--image", help="Image that they are to run; by default the newest of the stack.")
@click.pass_context
def doctor_aws(
    context: click.Context, /, stack: str, profile: str | None, region: str | None, as_json: bool, **question: Any
) -> None:
    """Tell what keeps workers on AWS from running: rights, network, image, quotas. Starts and changes nothing.

    Exit code 0: workers can run; 1: something blocks them.
    """
    asked = diagnosis.Question(**question)
    found = diagnosis.examine(Clients.of(region, profile), stack, asked, sources_here())
    click.echo(json.dumps(found.to_dict()) if as_json else str(found))
    context.exit(0 if found.healthy else 1)


#: What keys cost that stay, and what ends that.
_KEYS_COST = "at 0.40 USD a month each; --data deletes them, and so does `burst cleanup --force` of a session"


def _options(options: dict[str, Any]) -> dict[str, str]:
    """Return the parameters of the template that were given."""
    found = {name.removeprefix("p_"): value for name, value in options.items() if name.startswith("p_")}
    found |= {"PrivateEndpoints": options["private_endpoints"], "SelfHealing": options["self_healing"]}
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in found.items()
        if value is not None
    }


def _described(plan: Plan, clients: Clients) -> str:
    """Return what a plan does, for people."""
    told = [f"{'Creating' if plan.kind == 'CREATE' else 'Changing'} the stack {plan.stack} in {clients.region}:"]
    for change in plan.changes:
        again = " (anew, in its place)" if change.replaces else ""
        told.append(f"  {_DONE.get(change.action, change.action):7} {change.resource:18} {change.kind}{again}")
    there = "" if plan.parameters.get("CreateBucket") == "true" else " (it is there already)"
    told.append(f"Bucket: {plan.parameters['BucketName']}{there}")
    if not there and (days := plan.parameters.get("DataDays", "90")) != "0":
        told.append(f"Data of sessions, results too, is deleted after {days} days; --data-days 0 keeps it")
    public = "with" if plan.parameters.get("AssignPublicIp") == "ENABLED" else "without"
    told.append(
        f"Workers: in {plan.parameters.get('Subnets')}, {public} public addresses, and nobody can connect to them"
    )
    always = []
    if plan.parameters.get("PrivateEndpoints") == "true":
        always.append("Private endpoints cost about 7 USD a month, for each of seven in each zone, from now on")
    if any(plan.parameters.get(name, "0") != "0" for name in ("WarmX86", "WarmArm")):
        always.append("Disks of instances that are kept ready cost from now on")
    if looks := schedule.told(clients, plan.parameters):
        always.append(looks)
    if plan.kind == "CREATE":
        always.append(f"While no worker runs, only what is stored costs{', and that' if always else ''}")
    return "\n".join(told + always)


def _next_line(stack: Stack, plan: Plan) -> str:
    done = "was up to date" if plan.is_empty else "stands"
    lines = [f"The stack {stack.name} {done}.", f"  store  {stack.store}", f"  image  {stack.image or 'none yet'}"]
    if stack.image:
        lines += ["Next, in Python:", f'  Session("{stack.store}", workers=10, cpu=2, memory="8GB")']
    else:
        place = f" --region {stack.region}" + (f" --stack {stack.name}" if stack.name != DEFAULT_NAME else "")
        lines += ["Next:", f"  burst image push{place}"]
    return "\n".join(lines)


def _teller(quiet: bool) -> Callable[[Event], None]:
    """Return what prints an event of the stack, on standard error when standard output is JSON."""

    def tell(event: Event) -> None:
        if event.kind != "AWS::CloudFormation::Stack" and not event.status.endswith("_IN_PROGRESS"):
            reason = f": {event.reason}" if event.reason else ""
            click.echo(f"  {event.status.lower().replace('_', ' ')} {event.resource}{reason}", err=quiet)

    return tell


def _say(text: str, quiet: bool) -> None:
    click.echo(text, err=quiet)
