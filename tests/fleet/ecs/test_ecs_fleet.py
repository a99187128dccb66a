"""A fleet on ECS: what it starts and stops, and that it starts nothing twice."""

import asyncio
import itertools

import msgspec
import pytest
from ecs_stand_in import LOST

from burst_dask.aws.clients import Clients
from burst_dask.errors import CloudError, CloudLimit, CloudUnavailable, CredentialsExpired
from burst_dask.fleet.base import Ensuring, Fleet, Logging, Remote
from burst_dask.fleet.ecs.bounding import bound_of
from burst_dask.fleet.ecs.fleet import IDLE_REST, LOOK_EVERY, QUOTA_EVERY, SHOWN_WITHIN, SPOT_PATIENCE, SPOT_REST
from burst_dask.fleet.ecs.launching import CAPACITY_PATIENCE, PATIENCE, ROLE_PATIENCE, ROLE_SETTLES
from burst_dask.scaling.healer import Bounded, Elastic

NUMBERS = itertools.count(100)
NO_CAPACITY = {"tasks": [], "failures": [{"reason": "Capacity is unavailable at this time. Please try again later"}]}
THROTTLED = (400, "ThrottlingException", "Rate exceeded")


def counts(ecs):
    return [request["count"] for request in ecs.names("RunTask")]


def start(fleet, workers):
    """Carry out another start."""
    asyncio.run(fleet.begin(next(NUMBERS), workers))


def providers(ecs):
    return [request["capacityProviderStrategy"][0]["capacityProvider"] for request in ecs.names("RunTask")]


# ---------------------------------------------------------------------------- start, stop


def test_it_is_a_fleet(fleet_of, ecs):
    fleet = fleet_of()
    assert isinstance(fleet, Fleet) and isinstance(fleet, Remote) and isinstance(fleet, Logging)
    assert ecs.calls == [], "nothing is asked before it is needed"
    assert isinstance(fleet, Elastic) and isinstance(fleet, Bounded) and not isinstance(fleet, Ensuring)
    assert fleet.alive() == 0


def test_workers_start_in_batches(fleet_of, ecs):
    fleet = fleet_of()
    start(fleet, 25)
    assert counts(ecs) == [10, 10, 5]
    assert len({request["clientToken"] for request in ecs.names("RunTask")}) == 3
    assert fleet.alive() == len(ecs.running) == 25
    start(fleet, 2)
    assert fleet.alive() == 27


def test_workers_that_had_nothing_to_do_rest_for_a_while(fleet_of, ecs, clock):
    fleet = fleet_of()
    start(fleet, 4)
    *idle, lost, _ = ecs.running
    for task in idle:
        task.exit_code = 0
        task.over("EssentialContainerExited", "Essential container in task exited")
    ecs.take_back(lost)
    assert asyncio.run(fleet.resting()) == 2, "and not the one that was lost"
    clock.pause(IDLE_REST)
    assert asyncio.run(fleet.resting()) == 0


def test_workers_are_counted_by_their_starts_from_anywhere(fleet_of, ecs):
    fleet = fleet_of()
    asyncio.run(fleet.begin(7, 12))
    asyncio.run(fleet.begin(9, 2))
    other = fleet_of()
    assert asyncio.run(other.counted()) == asyncio.run(fleet.counted()) == {7: 12, 9: 2}
    described = len(ecs.names("DescribeTasks"))
    ecs.take_back(ecs.running[0])
    assert asyncio.run(other.counted()) == {7: 11, 9: 2}
    assert len(ecs.names("DescribeTasks")) == described, "what a task belongs to is asked once"


def test_a_start_is_done_once_however_often_it_is_asked_for(fleet_of, ecs, clock):
    asyncio.run(fleet_of().begin(7, 12))
    clock.pause(60)
    asyncio.run(fleet_of().begin(7, 12))
    assert len(ecs.tasks) == 12
    for task in list(ecs.running):
        ecs.take_back(task)
    clock.pause(7200)  # a machine that slept sends again what it did not hear of
    fleet = fleet_of()
    asyncio.run(fleet.begin(7, 12))
    assert len(ecs.tasks) == 12 and asyncio.run(fleet.counted()) == {}, "who is missed now is missed by another start"
    asyncio.run(fleet.begin(8, 12))
    assert len(ecs.tasks) == 24


def test_a_start_that_is_too_old_is_not_carried_on(fleet_of, ecs):
    """Its machine slept between two batches: others have been started in place of the rest."""
    fleet = fleet_of()
    with pytest.warns(UserWarning, match=r"10 of 25 workers .* were started: it took too long.* tried again while"):
        asyncio.run(fleet.begin(7, 25, lambda: len(ecs.tasks) < 10))
    assert len(ecs.tasks) == 10
    for task in list(ecs.running):
        ecs.take_back(task)
    with pytest.raises(CloudUnavailable, match=r"no worker of session sess1 could be started: it took too long"):
        asyncio.run(fleet.begin(8, 5, lambda: False))
    assert len(ecs.tasks) == 10


def test_a_call_that_is_throttled_is_not_sent_again_when_it_is_too_late(fleet_of, ecs, clock):
    ecs.always("RunTask", THROTTLED)
    with pytest.raises(CloudUnavailable, match="no worker of session sess1 could be started"):
        asyncio.run(fleet_of().begin(7, 5, lambda: not clock.pauses))
    assert len(ecs.names("RunTask")) == 1 and len(clock.pauses) == 1


def test_stopped_tasks_are_found_though_ecs_takes_one_filter_only(fleet_of, ecs, clock):
    def one_filter(call, request):
        several = {"startedBy", "desiredStatus"} <= request.keys()
        return (400, "InvalidParameterException", "one filter") if call == "ListTasks" and several else None

    ecs.faults.append(one_filter)
    fleet = fleet_of()
    for _ in range(3):
        start(fleet, 1)
        ecs.take_back(ecs.running[0])
        clock.pause(LOOK_EVERY)
    other = fleet_of("sess2")
    start(other, 1)
    ecs.take_back(ecs.running[0])
    assert fleet.notes() == ["3 stopped: Spot took its machine back (Your Spot Task was interrupted.)"]


def test_one_definition_for_all_sessions_of_a_shape(fleet_of, ecs):
    start(fleet_of("sess1", cpu=2, memory=5 << 30), 1)
    start(fleet_of("sess2", cpu=2, memory=5 << 30, tags={"project": "ice"}), 1)
    assert len(ecs.names("RegisterTaskDefinition")) == 1
    start(fleet_of("sess1", cpu=2, memory=6 << 30), 1)
    assert len(ecs.names("RegisterTaskDefinition")) == 2


def test_only_workers_of_the_session_are_counted_and_stopped(fleet_of, ecs):
    ours, theirs = fleet_of("sess1"), fleet_of("sess2")
    start(ours, 2)
    start(theirs, 3)
    assert (ours.alive(), theirs.alive()) == (2, 3)
    ours.remove()
    assert (ours.alive(), theirs.alive()) == (0, 3)
    assert {task.request["startedBy"] for task in ecs.running} == {"burst-sess2"}


def test_fewer_workers_are_had_by_stopping_those_that_do_not_run_yet(fleet_of, ecs, clock):
    fleet = fleet_of(spot=True)
    start(fleet, 2)
    clock.pause(60)
    start(fleet, 1)
    ecs.without_machines.add("FARGATE_SPOT")
    start(fleet, 2)
    first, second, third, *waiting = ecs.tasks
    fleet.reduce(3)
    assert all(task.desired == "STOPPED" for task in waiting)
    fleet.reduce(2)
    assert ecs.running == [first, second] and third.desired == "STOPPED", "the newest of those that run"
    fleet.reduce(2)
    assert fleet.alive() == 2


def test_tasks_that_do_not_stop_are_told_of(fleet_of, ecs):
    fleet = fleet_of()
    start(fleet, 1)
    ecs.always("StopTask", {"task": {}})
    with pytest.raises(CloudError, match=r"1 tasks of session sess1 were told to stop and still run, such as arn:"):
        fleet.stop()


def test_stopping_that_is_throttled_is_tried_again(fleet_of, ecs, clock):
    fleet = fleet_of()
    start(fleet, 5)
    ecs.once("StopTask", THROTTLED, times=3)
    fleet.stop()
    assert ecs.running == [] and len(ecs.names("StopTask")) == 8 and len(clock.pauses) == 1


def test_who_watches_asks_no_more_often_than_others(fleet_of, ecs, clock):
    fleet = fleet_of()
    start(fleet, 1)
    fleet.notes()
    asked = len(ecs.calls)
    fleet.notes()
    assert len(ecs.calls) == asked
    ecs.take_back(ecs.running[0])
    clock.pause(LOOK_EVERY)
    assert len(fleet.notes()) == 1


def test_a_task_that_ecs_has_forgotten_is_no_hindrance(fleet_of, ecs):
    fleet = fleet_of()
    start(fleet, 1)
    ecs.once("StopTask", (400, "InvalidParameterException", "The referenced task was not found."))
    ecs.always("DescribeTasks", {"tasks": [], "failures": []})
    fleet.stop()


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
    full = "You've reached the limit on the number of vCPUs you can run concurrently"
    answers = [{"tasks": [], "failures": [{"reason": full}]}, (400, "ClientException", full)]
    for answer in answers:
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
        (
            {"tasks": [], "failures": [{"reason": "You've reached the limit on the number of vCPUs you can run"}]},
            CloudLimit,
            "quota is used up; `burst doctor aws`",
        ),
        (
            (400, "ClientException", "You've reached the limit on the number of vCPUs you can run concurrently"),
            CloudLimit,
            "quota is used up; `burst doctor aws`",
        ),
        (
            (400, "ClientException", "ECS was unable to assume the role 'arn:aws:iam::1:role/x' that was provided"),
            CloudError,
            "may not assume a role of the stack.*iam:PassRole",
        ),
        (
            (400, "ExpiredTokenException", "The security token included in the request is expired"),
            CredentialsExpired,
            "credentials have expired",
        ),
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
    full = {"tasks": [], "failures": [{"reason": "You've reached the limit on the number of vCPUs"}]}
    ecs.faults.append(lambda call, request: full if call == "RunTask" and len(ecs.tasks) >= 20 else None)
    with pytest.warns(UserWarning, match=r"20 of 50 workers .* quota is used up.* the work goes on with fewer"):
        start(fleet, 50)
    assert len(ecs.tasks) == 20


def test_credentials_that_expire_half_way(fleet_of, ecs):
    fleet = fleet_of()
    expired = (400, "ExpiredTokenException", "The security token included in the request is expired")
    ecs.faults.append(lambda call, request: expired if call == "RunTask" and len(ecs.tasks) >= 10 else None)
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


# ---------------------------------------------------------------------------- quotas


def bound(fleet):
    return asyncio.run(fleet.bound())


def test_the_quota_bounds_a_fleet_and_is_asked_for_once_an_hour(fleet_of, ecs, clock):
    fleet = fleet_of(cpu=4, memory=8 << 30)
    ecs.quotas = {"L-3032A538": 30.0, "L-36FBB829": 9.0}
    found = bound(fleet)
    assert found.workers == 7
    assert found.why == (
        "Fargate: 30 vCPU at a time. Ask for more: `aws service-quotas request-service-quota-increase "
        "--service-code fargate --quota-code L-3032A538 --desired-value 256`, which may take a day"
    )
    ecs.quotas = {"L-3032A538": 60.0}
    clock.pause(QUOTA_EVERY - 1)
    assert bound(fleet) == found and len(ecs.names("GetServiceQuota")) == 1
    clock.pause(1)
    assert bound(fleet).workers == 15


@pytest.mark.parametrize(("spot", "workers"), [(False, 30), (True, 9), ("with-fallback", 39)])
def test_which_quotas_count(fleet_of, ecs, spot, workers):
    ecs.quotas = {"L-3032A538": 30.0, "L-36FBB829": 9.0}
    assert bound(fleet_of(spot=spot)).workers == workers


def test_a_quota_that_is_not_known_bounds_nothing(fleet_of, ecs, clock):
    fleet = fleet_of(spot="with-fallback")
    ecs.quotas = {"L-3032A538": 30.0}
    ecs.always("GetServiceQuota", (400, "AccessDeniedException", "no"))
    assert bound(fleet) is None
    asked = len(ecs.names("GetServiceQuota"))
    assert bound(fleet) is None and len(ecs.names("GetServiceQuota")) == asked, "nor is it asked again and again"


def test_on_instances_the_quota_counts_whole_ones(fleet_of, ecs):
    """Three workers share a machine of 8 processors."""
    ecs.quotas = {"L-1216C47A": 20.0, "L-34B43A08": 8.0}
    made = fleet_of().plan
    plan = msgspec.structs.replace(
        made, launch_type="EC2", cpu=2048, instance_type="m5.2xlarge", per_instance=3, vcpus=8, only_that_type=True
    )
    clients = Clients.of()

    def workers(**changes):
        found = bound_of(clients, msgspec.structs.replace(plan, **changes))
        return found and found.workers

    assert workers() == 6
    assert workers(spot="with-fallback") == 9
    assert workers(only_that_type=False) == 10, "others may come, whose processors workers have to themselves"
    assert workers(instance_type="g5.2xlarge") is None, "those with GPUs have another quota"


# ---------------------------------------------------------------------------- what became of them


def test_notes_say_what_became_of_workers(fleet_of, ecs, clock):
    fleet = fleet_of()
    start(fleet, 4)
    assert fleet.notes() == []
    spot, memory, other, _ = ecs.tasks
    ecs.take_back(spot)
    memory.container_reason, memory.exit_code = "OutOfMemoryError: Container killed due to memory usage", 137
    memory.over("EssentialContainerExited", "Essential container in task exited")
    other.stop("UserInitiated", "by hand")
    ecs.without_machines.add("FARGATE")
    start(fleet, 2)
    clock.pause(240)
    assert fleet.notes() == [
        "2 workers have been waiting for a machine or for their image for up to 4 min",
        "one stopped: Spot took its machine back (Your Spot Task was interrupted.)",
        "one stopped: it used more memory than its container has "
        "(OutOfMemoryError: Container killed due to memory usage)",
        "one stopped: somebody stopped it: by hand",
    ]
    said = fleet.describe()
    assert said.startswith(
        "3 workers on ECS, 1 vCPU with 2 GiB each on Fargate (x86_64); logs in the group /burst-dask/"
    )
    assert said.endswith("by hand")


def test_images_that_cannot_run(fleet_of, ecs):
    fleet = fleet_of(image="registry/missing:1")
    ecs.missing_images.add("registry/missing:1")
    start(fleet, 2)
    assert fleet.alive() == 0
    (note,) = fleet.notes()
    assert note.startswith("2 stopped: its image is not there; push it with `burst image push`")
    ecs.architectures = {"X86_64"}
    arm = fleet_of("sess2", arch="arm64")
    start(arm, 1)
    assert "its image is for another architecture: set arch=" in arm.describe()


def test_the_last_line_of_a_worker_that_failed_is_told(fleet_of, ecs):
    fleet = fleet_of()
    start(fleet, 2)
    one, other = ecs.tasks
    for task, line in ((one, "the session was refused: Dask 2025.1 here"), (other, "exec burst: exec format error")):
        ecs.stream(task)(line)
        task.exit_code = 3 if task is one else 255
        task.over("EssentialContainerExited", "Essential container in task exited")
    first, second = fleet.notes()
    assert first.endswith("its log says why (exit code 3): the session was refused: Dask 2025.1 here")
    assert "its image is for another architecture" in second


def test_it_cannot_be_described_while_aws_is_out_of_reach(fleet_of, ecs):
    fleet = fleet_of()
    ecs.always("ListTasks", (500, "ServerException", "try later"))
    assert "which cannot be asked now: AWS did not do ecs:ListTasks" in fleet.describe()


def test_logs_are_found_by_session_and_worker(fleet_of, ecs):
    fleet = fleet_of()
    start(fleet_of("sess2"), 1)
    start(fleet, 2)
    for number, task in enumerate(ecs.tasks):
        session = task.request["startedBy"].removeprefix("burst-")
        write = ecs.stream(task)
        write(f"INFO workers for session {session}: 1 processes of 1 threads")
        write(f"INFO worker w{number} started, pid 7")
    logs = fleet.process_logs()
    assert [log.name for log in logs] == [f"burst/worker/{task.id}" for task in ecs.tasks[1:]]
    assert [log.name for log in fleet.process_logs("w2")] == [f"burst/worker/{ecs.tasks[2].id}"]
    assert logs[0].text.endswith("worker w1 started, pid 7")
    assert fleet_of("sess3").process_logs() == []


# ---------------------------------------------------------------------------- a role of its own

UNKNOWN = (400, "ClientException", "ECS was unable to assume the role 'arn:aws:iam::1:role/x' that was provided")


def test_a_role_that_is_not_known_everywhere_yet_is_waited_for(fleet_of, ecs, clock):
    """IAM tells of a new role within seconds, and ECS refuses it until then."""
    fleet = fleet_of(isolated=True)
    ecs.once("RunTask", UNKNOWN, times=4)
    start(fleet, 2)
    assert len(ecs.tasks) == 2 and len(ecs.names("RunTask")) == 5 and 0 < sum(clock.pauses) < ROLE_PATIENCE
    assert len({request["clientToken"] for request in ecs.names("RunTask")}) == 1


def test_a_new_role_that_takes_longer_is_waited_for_by_another_start(fleet_of, ecs, clock):
    """The session stays: whoever opens another one begins with a role as young."""
    fleet = fleet_of(isolated=True, opened=clock.wall())
    ecs.always("RunTask", UNKNOWN)
    with pytest.warns(UserWarning, match=r"no worker of session sess1 was started yet: .* again a minute from now"):
        start(fleet, 2)
    with pytest.warns(UserWarning, match=r"no worker of session sess1 was started yet: .* again a minute from now"):
        asyncio.run(fleet.begin(next(NUMBERS), 2, lambda: len(ecs.names("RunTask")) < 8))  # there was no time left
    assert asyncio.run(fleet.counted()) == {}
    ecs.faults.clear()
    start(fleet, 2)
    assert fleet.alive() == 2
    clock.pause(ROLE_SETTLES)
    ecs.always("RunTask", UNKNOWN)
    with pytest.raises(CloudError, match="somebody has deleted it or changed its trust"):
        start(fleet, 2)


def test_a_role_that_is_never_known_is_told_of(fleet_of, ecs, clock):
    fleet = fleet_of(isolated=True)
    ecs.always("RunTask", UNKNOWN)
    with pytest.raises(CloudError, match=r"the session's own role.*asked for 25 seconds: somebody.*a new session"):
        start(fleet, 2)
    assert sum(clock.pauses) <= ROLE_PATIENCE
    with pytest.raises(CloudError, match="a role of the stack"):
        start(fleet_of(), 1)
    assert sum(clock.pauses) <= ROLE_PATIENCE, "one that has been there for long is not waited for"
