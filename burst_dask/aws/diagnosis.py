"""``burst doctor aws``: what keeps workers from running, told before any is started."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from burst_dask.aws import isolation, schedule
from burst_dask.aws.clients import Clients
from burst_dask.aws.explain import code_of, explained
from burst_dask.aws.image import Sources, differing
from burst_dask.aws.network import look_at
from burst_dask.aws.pushing import architectures_of
from burst_dask.aws.quotas import QUOTAS, read_quota
from burst_dask.aws.rights import missing
from burst_dask.aws.setup import bucket_region
from burst_dask.aws.stack import Stack, read_stack
from burst_dask.errors import AccessDenied, CloudError, CredentialsExpired, CredentialsMissing
from burst_dask.store.address import Address

#: ``"blocks"``: no worker can run; ``"note"``: some things will not work, or cost; ``"ok"``: as it should be.
Level = Literal["ok", "note", "blocks"]


#: Roles of single sessions from which on it is told how to have fewer.
_MANY_ROLES = 300


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    topic: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:7} {self.topic}: {self.text}"


@dataclass(frozen=True)
class Question:
    """What is to be started, as far as it is known; each part makes the answer more exact."""

    #: None: any that the image has
    arch: str | None = None
    launch_type: str = "FARGATE"
    spot: bool = False
    workers: int = 0
    cpus: float = 1.0
    #: URL of the store; by default the stack's own
    store: str | None = None
    #: URI of an image in ECR; by default the stack's newest
    image: str | None = None


@dataclass(frozen=True)
class Examination:
    """All that was found."""

    stack: str
    region: str
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing blocks."""
        return not any(finding.level == "blocks" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "stack": self.stack,
            "region": self.region,
            "healthy": self.healthy,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def __str__(self) -> str:
        blocking = sum(finding.level == "blocks" for finding in self.findings)
        end = f"{blocking} of these must be put right before workers can run" if blocking else "workers can run"
        return "\n".join([f"stack {self.stack} in {self.region}", *map(str, self.findings), end])


def examine(clients: Clients, name: str, question: Question, sources: Sources) -> Examination:
    """Look at everything that workers need. Nothing is changed and nothing is started."""
    return Examination(name, clients.region, tuple(_findings(clients, name, question, sources)))


def _findings(clients: Clients, name: str, question: Question, sources: Sources) -> Iterator[Finding]:
    try:
        yield Finding("ok", "credentials", f"you are {clients.identity['Arn']}")
        stack = read_stack(clients, name)
    except CloudError as error:
        yield Finding("blocks", "credentials", str(error))
        return
    if stack is None:
        yield Finding(
            "blocks", "stack", f"there is none: run `burst setup aws --stack {name} --region {clients.region}`"
        )
        return
    if not stack.usable:
        yield Finding(
            "blocks", "stack", f"it is {stack.status}: run `burst setup aws`, which puts it right or says why"
        )
        return
    yield Finding("ok", "stack", f"it stands ({stack.status})")
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "rights": lambda: _rights(clients, stack),
        "cluster": lambda: _cluster(clients, stack),
        "network": lambda: _network(clients, stack, question),
        "image": lambda: _image(clients, stack, question, sources),
        "schedule": lambda: _schedule(clients, stack),
        "isolation": lambda: _isolation(clients, stack),
        "quotas": lambda: _quotas(clients, question),
        "store": lambda: _store(clients, stack, question),
    }
    for topic, check in checks.items():
        try:
            yield from list(check())
        except (CredentialsExpired, CredentialsMissing) as error:
            yield Finding("blocks", topic, str(error))
        except CloudError as error:  # of what is not known it cannot be said that it blocks
            yield Finding("note", topic, f"cannot be looked at: {error}")


def _rights(clients: Clients, stack: Stack) -> Iterator[Finding]:
    found, how = missing(clients, stack)
    for right in found:
        where = "" if right.resource == "*" else f" on {right.resource}"
        yield Finding(
            "blocks" if right.needed else "note",
            "rights",
            f"you lack {right.action}{where}, for {right.purpose}; add it to your policy, or ask an administrator to",
        )
    yield Finding("note" if found else "ok", "rights", f"{len(found) or 'none'} missing, {how}")


def _cluster(clients: Clients, stack: Stack) -> Iterator[Finding]:
    with explained("ecs:DescribeClusters", stack.cluster):
        found = clients.client("ecs").describe_clusters(clusters=[stack.cluster])["clusters"]
    if not found or found[0]["status"] != "ACTIVE":
        yield Finding(
            "blocks",
            "cluster",
            f"{stack.cluster} is gone, though the stack stands: run `burst teardown aws`, then `burst setup aws`",
        )
    else:
        yield Finding("ok", "cluster", f"{stack.cluster} is active")


def _network(clients: Clients, stack: Stack, question: Question) -> Iterator[Finding]:
    subnets = look_at(clients, stack.name, None, stack.subnets, own_endpoints=True)
    # On EC2, workers use the network of their instance, which has the address.
    public = stack.assign_public_ip
    for subnet in subnets:
        blocked = False
        if not subnet.reaches_s3(public):
            blocked = True
            yield Finding(
                "blocks",
                "network",
                f"{subnet.id} has no way to S3: no gateway endpoint, no NAT"
                + (", and workers have no public address" if subnet.way == "public" else ", no gateway")
                + "; run `burst setup aws --subnets` with it again, which adds the endpoint",
            )
        if not subnet.reaches_registry(public):
            blocked = True
            yield Finding(
                "blocks",
                "network",
                f"{subnet.id} has no way to the image registry and to CloudWatch Logs: add a NAT, or run "
                "`burst setup aws --private-endpoints`",
            )
        if not blocked and not subnet.s3_endpoint and subnet.way == "nat":
            yield Finding(
                "note",
                "network",
                f"{subnet.id} reaches S3 through a NAT only, which costs by the gigabyte; "
                "`burst setup aws --subnets` with it again adds a gateway endpoint, which is free",
            )
        if subnet.free < max(1, question.workers if question.launch_type == "FARGATE" else 1):
            yield Finding(
                "note", "network", f"{subnet.id} has {subnet.free} free addresses; each worker on Fargate takes one"
            )
    yield Finding("ok", "network", f"{len(subnets)} subnets in {len({one.zone for one in subnets})} zones")


def _image(clients: Clients, stack: Stack, question: Question, sources: Sources) -> Iterator[Finding]:
    uri = question.image or stack.image
    if not uri:
        yield Finding("blocks", "image", f"{stack.repository} is empty: run `burst image push`")
        return
    if not question.image or uri.startswith(f"{stack.repository}:"):
        try:
            archs = architectures_of(clients, uri)
        except CloudError as error:
            if code_of(error) != "RepositoryNotFoundException":
                raise
            archs = None
        if archs is None:
            yield Finding("blocks", "image", f"there is no {uri}: run `burst image push`")
            return
        if question.arch and question.arch not in archs:
            has = " and ".join(archs) or "none that is known"
            yield Finding(
                "blocks",
                "image",
                f"{uri} is of the wrong architecture: it has {has}, and {question.arch} is "
                f"asked for. Run `burst image push --arch {question.arch}`, or use arch={archs[0]!r}"
                if archs
                else f"{uri} is for no architecture that is known: run `burst image push`",
            )
            return
        yield Finding("ok", "image", f"{uri} for {' and '.join(archs)}")
    else:
        yield Finding("note", "image", f"{uri} is not in the stack's repository: whether it is there is not known")
        return
    if uri.rpartition(":")[2] != sources.tag:
        yield Finding(
            "note",
            "image",
            "it was built of another version of burst_dask, of Python or of the lock: "
            "`burst image push` makes one of this installation",
        )
    if different := differing(sources):
        yield Finding("note", "image", different)


def _schedule(clients: Clients, stack: Stack) -> Iterator[Finding]:
    """Yield whether the schedule can run, and runs what workers do."""
    if not stack.schedule:
        return
    if architectures_of(clients, stack.heal_image) is None:
        gone = (
            f"there is no {stack.heal_image} any more, which it runs: run `burst setup aws`, which takes the newest one"
        )
        yield Finding("note", "schedule", gone)
    elif old := schedule.outdated(stack, stack.image):
        yield Finding("note", "schedule", old)
    else:
        yield Finding("ok", "schedule", f"{stack.schedule} runs {stack.heal_image}")


def _isolation(clients: Clients, stack: Stack) -> Iterator[Finding]:
    """Yield how many sessions have roles of their own, before an account has no room for another one."""
    try:
        count = len(isolation.roles_of(clients, stack))
    except AccessDenied:  # of interest to those only who open such sessions
        return
    if count:
        text = f"{count} sessions have roles of their own, and an account has 1,000 roles unless it asks for more"
        more = "; `burst cleanup SESSION` deletes that of one that is over" if count >= _MANY_ROLES else ""
        yield Finding("note" if more else "ok", "isolation", f"{text}{more}")


def _quotas(clients: Clients, question: Question) -> Iterator[Finding]:
    asked = (question.launch_type, question.spot)
    for launch_type, spot in QUOTAS:
        quota = read_quota(clients, launch_type, spot)
        if quota.value is None:
            yield Finding("note", "quotas", str(quota))
            continue
        text, more = str(quota), f"; ask for more: {quota.request(_desired(question))}, which may take a day"
        if (launch_type, spot) != asked:
            yield Finding("ok", "quotas", text)
        elif quota.value < question.cpus:
            yield Finding("blocks", "quotas", f"{text}, less than one worker of {question.cpus:g} takes{more}")
        elif not quota.holds(question.workers, question.cpus):
            fit = int(quota.value // question.cpus)
            yield Finding(
                "blocks",
                "quotas",
                f"{text}: of {question.workers} workers of {question.cpus:g} vCPU each, {fit} can run{more}",
            )
        elif quota.value < 64:
            yield Finding(
                "note",
                "quotas",
                f"{text}, so {quota.value // question.cpus:g} workers of {question.cpus:g} at most{more}",
            )
        else:
            yield Finding("ok", "quotas", text)


def _desired(question: Question) -> int:
    """Return a quota that is worth asking for: some more than is needed, in round numbers."""
    needed = question.workers * question.cpus
    return next(size for size in (256 << doublings for doublings in range(64)) if size >= needed)


def _store(clients: Clients, stack: Stack, question: Question) -> Iterator[Finding]:
    address = Address.parse(question.store or stack.store)
    if address.scheme != "s3":
        yield Finding("blocks", "store", f"workers on AWS cannot reach {address.url}: use {stack.store}")
        return
    bucket = address.place
    try:
        region = bucket_region(clients, bucket)
    except AccessDenied as error:
        yield Finding("blocks", "store", str(error))
        return
    if region is None:
        yield Finding("blocks", "store", f"there is no bucket {bucket}: run `burst setup aws`, or correct the address")
        return
    if region != clients.region:
        yield Finding(
            "blocks",
            "store",
            f"the bucket {bucket} is in {region}, and workers are in {clients.region}: each "
            f"request is slow, and each byte costs. Use a bucket here, such as {stack.store}, or a stack "
            f"there: `burst setup aws --region {region}`",
        )
        return
    yield Finding("ok", "store", f"the bucket {bucket} is in {region}, as workers are")
    if bucket == stack.bucket and not f"{address.path}/".startswith(f"{stack.prefix}/"):
        yield Finding(
            "blocks",
            "store",
            f"workers may write below {stack.prefix}/ only: use {stack.store}, or run "
            f"`burst setup aws --store s3://{bucket}/{address.path}`",
        )
    yield from _protection(clients, bucket)


def _protection(clients: Clients, bucket: str) -> Iterator[Finding]:
    """Yield what of a bucket lets others in. Who can write to it can run code."""
    try:
        with explained("s3:GetBucketPublicAccessBlock", bucket):
            found = clients.client("s3").get_public_access_block(Bucket=bucket)["PublicAccessBlockConfiguration"]
    except CloudError as error:
        if code_of(error) != "NoSuchPublicAccessBlockConfiguration":
            raise
        found = {}
    if not found or not all(found.values()):
        yield Finding(
            "note",
            "store",
            f"public access to {bucket} is not blocked, and who can write to it can run code: "
            f"`aws s3api put-public-access-block --bucket {bucket} --public-access-block-configuration "
            "BlockPublicAcls=true,IgnorePublicAcls=true,BlockPublicPolicy=true,RestrictPublicBuckets=true`",
        )
