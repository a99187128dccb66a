"""Starting tasks on ECS: one task definition for each shape, RunTask in batches, retries that start nothing twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from burst_dask.aws.clients import Clients
from burst_dask.aws.explain import code_of, explained
from burst_dask.clock import Entropy, PausingClock
from burst_dask.errors import AccessDenied, CloudError, CloudLimit, CloudUnavailable
from burst_dask.fleet.ecs import words
from burst_dask.fleet.ecs.definition import BATCH, client_token, run_request, task_definition
from burst_dask.fleet.ecs.plan import EcsPlan
from burst_dask.fleet.ecs.words import Failure
from burst_dask.protocol.keys import SessionId

T = TypeVar("T")

#: Fargate lets an account start so many tasks at once, and then so many a second; so many calls of RunTask are 200.
BURST, RATE = 100.0, 20.0
#: Seconds for which a call that is throttled, or whose answer is lost, is sent again …
PATIENCE = 60.0
#: … and for which machines are waited for while nobody has one free. Who waits for results asks again later.
CAPACITY_PATIENCE = 15.0
#: … and for which a role that was just made is waited for: it is known everywhere within seconds. A start has half a
#: minute to be sent.
ROLE_PATIENCE = 25.0
#: Seconds since a session was opened for which ECS may yet not know its role; later, somebody has changed it.
ROLE_SETTLES = 600.0
#: Pauses before the first retry and before later ones at most, in seconds.
_FIRST, _LONGEST = 1.0, 20.0
#: Why the rest of a start is not sent any more.
_TOO_LATE = "it took too long, as when a machine sleeps, and others may have been started in their place"


class Launch(NamedTuple):
    """What became of a wish for workers."""

    #: ARNs of the tasks
    tasks: tuple[str, ...]
    #: why there are not more; None when there are as many as were wanted
    shortfall: Failure | None
    #: whether no machine of Spot was free for some
    spot_short: bool = False


class RoleNotKnownYet(CloudUnavailable):
    """ECS does not take the role that a session has of its own, and that was made just now."""


class Pace:
    """Keeps below the rate at which an account may start tasks."""

    def __init__(self, clock: PausingClock) -> None:
        self._clock = clock
        self._left, self._at = BURST, clock.monotonic()

    def take(self, tasks: int) -> None:
        """Wait until that many tasks may be started."""
        self._refill()
        if self._left < tasks:
            self._clock.pause((tasks - self._left) / RATE)
            self._refill()
        self._left -= tasks

    def _refill(self) -> None:
        now = self._clock.monotonic()
        self._left = min(BURST, self._left + (now - self._at) * RATE)
        self._at = now


class Launcher:
    """Starts workers of one session."""

    def __init__(
        self,
        clients: Clients,
        plan: EcsPlan,
        session: SessionId,
        store: str,
        clock: PausingClock,
        entropy: Entropy,
        *,
        opened: float = 0.0,
        key: str = "",
    ) -> None:
        self._opened, self._key = opened, key
        self._ecs = clients.client("ecs")
        self._plan = plan
        self._session, self._store = session, store
        self._clock, self._entropy = clock, entropy
        self._pace = Pace(clock)
        self._definition = ""

    def launch(self, count: int, number: int, still: Callable[[], bool], *, avoid_spot: bool = False) -> Launch:
        """Start up to `count` workers.

        Parameters
        ----------
        number
            Of the start that they belong to, which nobody else carries out.
        still
            Tells whether it is yet to be carried out; when it is not, nothing more is sent.
        avoid_spot
            Whether machines other than those of Spot are to be tried first, if the plan allows for them.

        Raises
        ------
        CloudError
            The very first call was refused: nothing was started.
        """
        providers = self._plan.providers()
        if avoid_spot and len(providers) > 1:
            providers = providers[1:]
        return _Launching(self, count, number, still, providers).run()

    # ------------------------------------------------------------------ calls

    @property
    def definition(self) -> str:
        """ARN of the task definition, which is registered unless it is there."""
        if not self._definition:
            wanted = task_definition(self._plan)
            self._definition = self._find(wanted["family"]) or self._register(wanted)
        return self._definition

    def _find(self, family: str) -> str:
        try:
            with explained("ecs:DescribeTaskDefinition", family, "Nothing was started"):
                found = self._ecs.describe_task_definition(taskDefinition=family)["taskDefinition"]
        except AccessDenied:
            return family  # a worker, which need not ask: it runs because there is one
        except CloudError as error:
            if code_of(error) == "ClientException":  # how ECS says that there is none
                return ""
            raise
        return str(found["taskDefinitionArn"]) if found.get("status", "ACTIVE") == "ACTIVE" else ""

    def _register(self, wanted: dict[str, Any]) -> str:
        def register() -> str:
            with explained("ecs:RegisterTaskDefinition", wanted["family"], "Nothing was started"):
                answer = self._ecs.register_task_definition(**wanted)
            return str(answer["taskDefinition"]["taskDefinitionArn"])

        return self._retried(register)

    def run_task(self, provider: str, count: int, number: int, call: int, still: Callable[[], bool]) -> dict[str, Any]:
        """Start a batch; the same call again, also after a lost answer, starts nothing more.

        Returns
        -------
        dict
            The answer: ``"tasks"`` and ``"failures"``.
        """
        request = run_request(
            self._plan, self.definition, self._session, self._store, provider, count, number, key=self._key
        )
        token = client_token(request, call)
        self._pace.take(count)

        def run() -> dict[str, Any]:
            if not still():
                raise CloudUnavailable(_TOO_LATE)
            try:
                with explained("ecs:RunTask", f"the cluster {self._plan.stack.cluster}"):
                    answer: dict[str, Any] = self._ecs.run_task(**request, clientToken=token)
                    return answer
            except CloudError as error:
                if code_of(error) != "ConflictException":
                    raise
                # The token stands for another request: those tasks are this start's as well.
                there = getattr(error.__cause__, "response", {}).get("resourceIds", [])
                return {"tasks": [{"taskArn": arn} for arn in there], "failures": []}

        return self._retried(run, still)

    def _retried(self, call: Callable[[], T], still: Callable[[], bool] = lambda: True) -> T:
        """Return what `call` returns; while `still`, again if AWS throttles, is away or does not know a role."""
        began, tries = self._clock.monotonic(), 0
        while True:
            try:
                return call()
            except CloudError as error:
                racing = "concurrent attempts" in str(error)  # to register the same name
                unknown = self._plan.isolated and words.is_unknown_role(error)
                until = began + (ROLE_PATIENCE if unknown else PATIENCE)
                delay = self.delay(tries)
                again = (isinstance(error, CloudUnavailable) or racing or unknown) and still()
                if not again or self._clock.monotonic() + delay > until:
                    if unknown:
                        raise self._of_unknown_role(error) from error
                    failure = words.of_error(error, self._plan.size)
                    if failure.kind is type(error) and failure.text == str(error):
                        raise
                    raise failure.kind(failure.text) from error
                tries += 1
                self._clock.pause(delay)

    def _of_unknown_role(self, error: CloudError) -> CloudError:
        """Return the error for a role that ECS does not take: that of a new session may yet be taken."""
        said = f"ECS may not assume the session's own role {self._plan.task_role}, asked for {ROLE_PATIENCE:g} seconds"
        if self._clock.wall() - self._opened < ROLE_SETTLES:
            return RoleNotKnownYet(f"{said}: a new role is known everywhere after some seconds, mostly. {error}")
        return CloudError(f"{said}: somebody has deleted it or changed its trust. Open a new session. {error}")

    def delay(self, tries: int) -> float:
        """Return a pause that grows with each try; with jitter, so that clients do not come back all at once."""
        return self._entropy.uniform(0.5, 1.0) * min(_LONGEST, _FIRST * 2.0**tries)

    def pause(self, seconds: float) -> None:
        self._clock.pause(seconds)

    def monotonic(self) -> float:
        return self._clock.monotonic()


class _Launching:
    """One start, batch by batch."""

    def __init__(
        self, launcher: Launcher, count: int, number: int, still: Callable[[], bool], providers: list[str]
    ) -> None:
        self._launcher, self._number, self._still, self._providers = launcher, number, still, providers
        #: how many are yet to be asked for
        self._left = self._count = count
        self._started: dict[str, None] = {}
        self._calls = self._tries = 0
        self._until = launcher.monotonic() + CAPACITY_PATIENCE
        self._shortfall: Failure | None = None
        self._spot_short = False

    def run(self) -> Launch:
        while self._left > 0 and self._go_on():
            pass
        missing = self._count > len(self._started)
        return Launch(tuple(self._started), self._shortfall if missing else None, self._spot_short)

    def _go_on(self) -> bool:
        """Ask for one batch; tell whether to go on."""
        asked = min(BATCH, self._left)
        self._calls += 1
        try:
            answer = self._launcher.run_task(self._providers[0], asked, self._number, self._calls, self._still)
        except CloudError as error:
            failure = Failure(type(error), str(error))
            # Of others it is not known whether they were started all the same.
            if isinstance(error, CloudLimit) and self._fall_back():
                return True
            if not self._started and self._still():
                raise
            self._shortfall = failure
            return False
        # Also those that have ended since: the answer may be to a call that was made long ago.
        self._started.update((task["taskArn"], None) for task in answer["tasks"])
        failures = [words.of_failure(one.get("reason", ""), one.get("detail", "")) for one in answer["failures"]]
        self._left -= len(answer["tasks"]) if failures else asked
        return self._failed(failures[0]) if failures else True

    def _failed(self, failure: Failure) -> bool:
        """Some of a batch were not started; tell whether to go on."""
        self._shortfall = failure
        if (failure.may_pass or issubclass(failure.kind, CloudLimit)) and self._fall_back():
            return True
        if not failure.may_pass:
            return False
        delay = self._launcher.delay(self._tries)
        self._tries += 1
        if self._launcher.monotonic() + delay > self._until:
            return False
        self._launcher.pause(delay)
        return True

    def _fall_back(self) -> bool:
        """Take others than those of Spot, if there may be any: it has none free, or the account may have no more."""
        if len(self._providers) < 2 or not self._still():
            return False
        self._providers = self._providers[1:]
        self._spot_short = True
        return True
