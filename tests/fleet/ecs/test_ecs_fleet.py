"""A fleet on ECS: what it starts, counts and stops, and what it knows of what became of them."""

import asyncio

import pytest
from starting import THROTTLED, start

from burst_dask.errors import CloudError, CloudUnavailable
from burst_dask.fleet.base import Ensuring, Fleet, Logging, Remote
from burst_dask.fleet.ecs.fleet import IDLE_REST, LOOK_EVERY
from burst_dask.scaling.healer import Bounded, Elastic


def counts(ecs):
    return [request["count"] for request in ecs.names("RunTask")]


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
