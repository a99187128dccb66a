"""Starting tasks on ECS: nothing twice, what stands in the way, and what is waited for."""

import asyncio

import pytest
from ecs_stand_in import LOST
from starting import EXPIRED, FULL, NUMBERS, THROTTLED, UNKNOWN_ROLE, not_started, start

from burst_dask.errors import CloudError, CloudLimit, CloudUnavailable, CredentialsExpired
from burst_dask.fleet.ecs.fleet import LOOK_EVERY, SHOWN_WITHIN, SPOT_PATIENCE, SPOT_REST
from burst_dask.fleet.ecs.launching import CAPACITY_PATIENCE, PATIENCE, ROLE_PATIENCE, ROLE_SETTLES, RoleNotKnownYet

NO_CAPACITY = not_started("Capacity is unavailable at this time. Please try again later")


def providers(ecs):
    return [request["capacityProviderStrategy"][0]["capacityProvider"] for request in ecs.names("RunTask")]


# ---------------------------------------------------------------------------- nothing twice


def test_a_lost_answer_starts_no_second_batch(fleet_of, ecs):
    fleet = fleet_of()
    ecs.once("RunTask", LOST)
    start(fleet, 5)
    first, second = ecs.names("RunTask")
    assert first["clientToken"] == second["clientToken"] and len(ecs.tasks) == 5


def test_what_was_started_counts_before_it_is_listed(fleet_of, ecs, clock):
    fleet = fleet_of()
    ecs.always("ListTasks", {"taskArns": []})
    start(fleet, 3)
    assert fleet.alive() == 3
    ecs.take_back(ecs.tasks[0])
    assert fleet.alive() == 2, "it is known to have ended"
    clock.pause(SHOWN_WITHIN)
    assert fleet.alive() == 0


def test_another_wish_under_the_same_token(fleet_of, ecs):
    """ECS names the tasks that the token stands for; they are somebody's, and count."""
    fleet = fleet_of()
    conflict = (400, "ConflictException", "already in use", {"resourceIds": ["arn:task/c/1", "arn:task/c/2"]})
    ecs.once("RunTask", conflict)
    start(fleet, 2)
    assert ecs.tasks == [] and fleet.alive() == 2


# ---------------------------------------------------------------------------- what stands in the way


def test_throttled_calls_are_sent_again_with_jitter(fleet_of, ecs, clock):
    ecs.once("RunTask", THROTTLED, times=4)
    start(fleet_of(), 5)
    assert len(clock.pauses) == 4 and all(0.5 * 2**n <= pause <= 2**n for n, pause in enumerate(clock.pauses))
    assert len({request["clientToken"] for request in ecs.names("RunTask")}) == 1


def test_throttled_for_long(fleet_of, ecs, clock):
    ecs.always("RunTask", THROTTLED)
    with pytest.raises(CloudUnavailable, match=r"AWS throttles ecs:RunTask"):
        start(fleet_of(), 5)
    assert PATIENCE / 2 < sum(clock.pauses) <= PATIENCE


def test_starting_many_keeps_to_the_rate_of_the_account(fleet_of, ecs, clock):
    start(fleet_of(), 250)
    assert sum(clock.pauses) == pytest.approx((250 - 100) / 20)


def test_no_capacity(fleet_of, ecs, clock):
    ecs.always("RunTask", NO_CAPACITY)
    with pytest.raises(
        CloudUnavailable, match=r"no worker of session sess1 could be started: AWS has no machine .* kept"
    ):
        start(fleet_of(), 5)
    assert 0 < sum(clock.pauses) <= CAPACITY_PATIENCE
    tokens = [request["clientToken"] for request in ecs.names("RunTask")]
    assert len(set(tokens)) == len(tokens), "ECS would answer the same again"


def test_some_capacity(fleet_of, ecs, clock):
    fleet = fleet_of()
    start(fleet, 10)
    ecs.always("RunTask", NO_CAPACITY)
    with pytest.warns(UserWarning, match=r"0 of 2 workers .* were started: AWS has no machine .* tried again while"):
        start(fleet, 2)
    ecs.faults.clear()
    start(fleet, 2)
    assert fleet.alive() == 12


def test_spot_with_a_fallback(fleet_of, ecs, clock):
    fleet = fleet_of(spot="with-fallback")
    ecs.once("RunTask", NO_CAPACITY)
    start(fleet, 3)
    assert providers(ecs) == ["FARGATE_SPOT", "FARGATE"] and fleet.alive() == 3
    start(fleet, 1)
    assert providers(ecs)[2:] == ["FARGATE"], "Spot is not asked again soon"
    clock.pause(SPOT_REST)
    start(fleet, 1)
    assert providers(ecs)[3:] == ["FARGATE_SPOT"]


def test_a_quota_of_spot_that_is_used_up_is_a_reason_for_others(fleet_of, ecs):
    for answer in [not_started(FULL), (400, "ClientException", FULL)]:
        ecs.calls.clear()
        ecs.once("RunTask", answer)
        start(fleet_of(spot="with-fallback"), 3)
        assert providers(ecs) == ["FARGATE_SPOT", "FARGATE"]
    assert len(ecs.running) == 6


def test_answers_that_are_lost_are_no_reason_for_others(fleet_of, ecs):
    """They may have been started."""
    ecs.always("RunTask", LOST)
    with pytest.raises(CloudUnavailable):
        start(fleet_of(spot="with-fallback"), 3)
    assert len(ecs.tasks) == 3 and set(providers(ecs)) == {"FARGATE_SPOT"}


def test_spot_without_a_fallback_waits(fleet_of, ecs):
    fleet = fleet_of(spot=True)
    ecs.once("RunTask", NO_CAPACITY, times=2)
    start(fleet, 3)
    assert set(providers(ecs)) == {"FARGATE_SPOT"}


def test_instances_of_spot_that_do_not_come_are_given_up(fleet_of, ecs, clock):
    fleet = fleet_of(launch_type="EC2", spot="with-fallback")
    ecs.without_machines.add("burst-dask-x86-spot")
    start(fleet, 2)
    clock.pause(LOOK_EVERY)
    assert sum(asyncio.run(fleet.counted()).values()) == 2, "an instance takes its time"
    clock.pause(SPOT_PATIENCE)
    assert asyncio.run(fleet.counted()) == {}
    start(fleet, 2)
    assert [task.provider for task in ecs.running] == ["burst-dask-x86"] * 2
    assert fleet.notes() == [], "it was this fleet that stopped the others"


def test_a_look_at_a_fleet_that_may_fall_back_describes_each_task_once(fleet_of, ecs):
    start(fleet_of(spot="with-fallback"), 3)
    ecs.calls.clear()
    assert list(asyncio.run(fleet_of(spot="with-fallback").counted()).values()) == [3]
    assert [len(request["tasks"]) for request in ecs.names("DescribeTasks")] == [3]


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (not_started(FULL), CloudLimit, "quota is used up; `burst doctor aws`"),
        ((400, "ClientException", FULL), CloudLimit, "quota is used up; `burst doctor aws`"),
        (UNKNOWN_ROLE, CloudError, "may not assume a role of the stack.*iam:PassRole"),
        (EXPIRED, CredentialsExpired, "credentials have expired"),
        (
            (400, "ClusterNotFoundException", "Cluster not found."),
            CloudError,
            "the cluster is gone: .*cluster burst-dask",
        ),
        (
            (400, "AccessDeniedException", "User: arn:u is not authorized to perform: ecs:RunTask on resource: arn:r"),
            CloudError,
            "lack the right ecs:RunTask on arn:r",
        ),
    ],
)
def test_what_waiting_does_not_help_against_is_told_at_once(fleet_of, ecs, clock, answer, error, message):
    ecs.always("RunTask", answer)
    with pytest.raises(error, match=message):
        start(fleet_of(), 5)
    assert clock.pauses == [] and len(ecs.names("RunTask")) == 1


def test_a_quota_that_is_reached_half_way(fleet_of, ecs):
    fleet = fleet_of()
    full = not_started(FULL)
    ecs.faults.append(lambda call, request: full if call == "RunTask" and len(ecs.tasks) >= 20 else None)
    with pytest.warns(UserWarning, match=r"20 of 50 workers .* quota is used up.* the work goes on with fewer"):
        start(fleet, 50)
    assert len(ecs.tasks) == 20


def test_credentials_that_expire_half_way(fleet_of, ecs):
    fleet = fleet_of()
    ecs.faults.append(lambda call, request: EXPIRED if call == "RunTask" and len(ecs.tasks) >= 10 else None)
    with pytest.warns(UserWarning, match=r"10 of 30 workers .* credentials have expired"):
        start(fleet, 30)
    assert fleet.alive() == 10


def test_a_size_that_fargate_has_no_more(fleet_of, ecs):
    ecs.once("RegisterTaskDefinition", (400, "ClientException", "No Fargate configuration exists for given values."))
    with pytest.raises(CloudError, match=r"Fargate has no machine of that size\. Workers are 2 vCPU with 7 GiB"):
        start(fleet_of(cpu=2, memory=7 << 30), 1)


def test_two_that_register_the_same_at_once(fleet_of, ecs):
    race = "Too many concurrent attempts to create a new revision of the specified family."
    ecs.once("RegisterTaskDefinition", (400, "ClientException", race))
    start(fleet_of(cpu=2, memory=8 << 30), 1)


def test_a_worker_that_may_not_ask_for_definitions_uses_the_one_that_is_there(fleet_of, ecs):
    start(fleet_of(), 1)
    ecs.always("DescribeTaskDefinition", (400, "AccessDeniedException", "no"))
    start(fleet_of(), 1)
    assert len(ecs.running) == 2 and len(ecs.names("RegisterTaskDefinition")) <= 1


# ---------------------------------------------------------------------------- a role of its own


def test_a_role_that_is_not_known_everywhere_yet_is_waited_for(fleet_of, ecs, clock):
    """IAM tells of a new role within seconds, and ECS refuses it until then."""
    fleet = fleet_of(isolated=True)
    ecs.once("RunTask", UNKNOWN_ROLE, times=4)
    start(fleet, 2)
    assert len(ecs.tasks) == 2 and len(ecs.names("RunTask")) == 5 and 0 < sum(clock.pauses) < ROLE_PATIENCE
    assert len({request["clientToken"] for request in ecs.names("RunTask")}) == 1


def test_a_new_role_that_takes_longer_is_waited_for_by_another_start(fleet_of, ecs, clock):
    """The session stays: whoever opens another one begins with a role as young."""
    fleet = fleet_of(isolated=True, opened=clock.wall())
    ecs.always("RunTask", UNKNOWN_ROLE)
    with pytest.raises(RoleNotKnownYet, match="a new role is known everywhere after some seconds"):
        start(fleet, 2)
    with pytest.raises(RoleNotKnownYet, match="a new role is known everywhere after some seconds"):
        asyncio.run(fleet.begin(next(NUMBERS), 2, lambda: len(ecs.names("RunTask")) < 8))  # there was no time left
    assert asyncio.run(fleet.counted()) == {}
    ecs.faults.clear()
    start(fleet, 2)
    assert fleet.alive() == 2
    clock.pause(ROLE_SETTLES)
    ecs.always("RunTask", UNKNOWN_ROLE)
    with pytest.raises(CloudError, match="somebody has deleted it or changed its trust"):
        start(fleet, 2)


def test_a_role_that_is_never_known_is_told_of(fleet_of, ecs, clock):
    fleet = fleet_of(isolated=True)
    ecs.always("RunTask", UNKNOWN_ROLE)
    with pytest.raises(CloudError, match=r"the session's own role.*asked for 25 seconds: somebody.*a new session"):
        start(fleet, 2)
    assert sum(clock.pauses) <= ROLE_PATIENCE
    with pytest.raises(CloudError, match="a role of the stack"):
        start(fleet_of(), 1)
    assert sum(clock.pauses) <= ROLE_PATIENCE, "one that has been there for long is not waited for"
