"""The schedule of the stack: which image it runs, what it costs, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from burst_dask.aws import schedule, setup
from burst_dask.aws.assets import TEMPLATE, asset
from burst_dask.aws.stack import read_stack

README = Path(__file__).parents[2] / "README.md"


def push(account, tag, *archs):
    """Have an image in the repository."""
    kind = "application/vnd.oci.image.index.v1+json"
    parts = [{"digest": f"sha256:{tag}", "platform": {"architecture": arch}} for arch in archs]
    account.clients.client("ecr").put_image(
        repositoryName="burst-dask",
        imageManifest=json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": parts}),
        imageManifestMediaType=kind,
        imageTag=tag,
    )
    return f"123456789012.dkr.ecr.us-east-1.amazonaws.com/burst-dask:{tag}"


def test_a_schedule_needs_an_image_and_so_comes_later(account, burst):
    shown = burst("setup", "aws", "--yes", "--heal-every", "15")
    assert shown.exit_code == 1 and read_stack(account.clients) is None
    order = "`burst setup aws` without --heal-every, `burst image push`, `burst setup aws --heal-every 15`"
    assert f"the stack burst-dask has none yet. In this order: {order}. Nothing was changed" in shown.output
    burst("setup", "aws", "--yes")
    shown = burst("setup", "aws", "--yes", "--heal-every", "15")
    assert "In this order: `burst image push`, `burst setup aws --heal-every 15`" in shown.output


def test_a_schedule_with_its_image_and_what_it_costs(stack, burst):
    image = push(stack, "new", "amd64", "arm64")
    shown = burst("setup", "aws", "--heal-every", "15", "--dry-run")
    sent = stack.sent()
    assert (sent["HealEvery"], sent["HealImage"], sent["HealArchitecture"]) == ("15", image, "ARM64")
    hourly = 0.25 * 0.03238 + 0.5 * 0.00356 + 0.005  # with a public address
    told = (
        "Every 15 minutes a task looks where work waits with no worker alive: 2,920 starts a month of 0.25 vCPU with "
        f"0.5 GiB (arm64), each paid for a minute or so: about {2920 / 60 * hourly:.2f} USD, by the table of"
    )
    assert told in shown.output
    on_x86 = hourly + 0.25 * (0.04048 - 0.03238) + 0.5 * (0.004445 - 0.00356)
    costs = f"(in us-east-1 {2920 / 60 * hourly:.2f} USD a month on Arm, {2920 / 60 * on_x86:.2f} on x86)"
    assert costs in README.read_text()


def test_a_schedule_on_the_only_architecture_that_there_is(stack, burst):
    push(stack, "new", "amd64")
    assert "(x86_64), each paid" in burst("setup", "aws", "--heal-every", "60", "--dry-run").output
    assert stack.sent()["HealArchitecture"] == "X86_64"


@pytest.fixture
def scheduled(stack):
    """A stack with a schedule. moto cannot change stacks, so it is made anew."""
    formation, image = stack.clients.client("cloudformation"), f"{read_stack(stack.clients).repository}:first"
    kept = (*setup.OPTIONS, *setup.NETWORK, *setup.BUCKET)
    found = {key: value for key, value in stack.has().items() if key in kept}
    found |= {"HealEvery": "15", "HealImage": image}
    formation.delete_stack(StackName="burst-dask")
    formation.create_stack(
        StackName="burst-dask",
        TemplateBody=asset(TEMPLATE).read_text(),
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in found.items()],
    )
    assert push(stack, "first", "amd64") == image
    stack.calls.clear()
    return stack, image


def test_a_schedule_takes_the_newest_image_and_stays_when_it_cannot_be_seen(scheduled, burst):
    account, first = scheduled
    assert (read_stack(account.clients).schedule, read_stack(account.clients).heal_image) == ("burst-dask-heal", first)
    burst("setup", "aws", "--dry-run")
    assert account.sent()["HealImage"] == first
    newest = push(account, "second", "amd64")
    burst("setup", "aws", "--dry-run")
    assert account.sent()["HealImage"] == newest
    account.denies("ecr:DescribeImages")
    burst("setup", "aws", "--dry-run")
    assert (account.sent()["HealImage"], account.sent()["HealEvery"]) == (first, "15")


def test_the_doctor_looks_at_the_schedule(scheduled, burst):
    account, first = scheduled
    assert f"ok      schedule: burst-dask-heal runs {first}\n" in burst("doctor", "aws").output
    newest = push(account, "second", "amd64")
    assert f"`burst setup aws` has it run {newest}\n" in burst("doctor", "aws").output
    account.clients.client("ecr").batch_delete_image(repositoryName="burst-dask", imageIds=[{"imageTag": "first"}])
    assert f"note    schedule: there is no {first} any more" in burst("doctor", "aws").output


def test_an_image_that_is_pushed_is_not_that_of_the_schedule(scheduled):
    account, first = scheduled
    stack = read_stack(account.clients)
    assert schedule.outdated(stack, first) == ""
    said = f"The schedule of the stack burst-dask runs {first}; `burst setup aws` has it run {first}2"
    assert schedule.outdated(stack, f"{first}2") == said


@pytest.mark.parametrize("minutes", ["1", "4", "1441"])
def test_a_schedule_within_reason(stack, burst, minutes):
    shown = burst("setup", "aws", "--yes", "--heal-every", minutes)
    assert shown.exit_code == 1 and "must be 5 to 1440 minutes, or 0 for never" in shown.output
