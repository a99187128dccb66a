"""Builds images and pushes them: with the docker of this machine, or with CodeBuild where there is none.

Either builds one image for each architecture, ``<hash>-x86_64`` and ``<hash>-arm64``, and then an index ``<hash>`` of
what there is, by which ECS takes the right one.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from burst_dask import sync
from burst_dask.aws.clients import Clients
from burst_dask.aws.explain import code_of, explained
from burst_dask.aws.image import Sources
from burst_dask.aws.stack import ARCHITECTURES, IMAGE_ARCHITECTURES, Stack, repository_name
from burst_dask.clock import Clock
from burst_dask.errors import CloudError, CloudUnavailable, ConfigError, WaitTimeout

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
LIST_TYPE = "application/vnd.docker.distribution.manifest.list.v2+json"
IMAGE_TYPES = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
#: Where sources of builds lie in the stack's bucket; a lifecycle rule deletes them after a week.
SOURCES = "image/"
_BUILDERS = {
    "x86_64": ("LINUX_CONTAINER", "aws/codebuild/amazonlinux-x86_64-standard:5.0"),
    "arm64": ("ARM_CONTAINER", "aws/codebuild/amazonlinux-aarch64-standard:3.0"),
}
_STDERR = 2
_POLL = 5.0
_LONGEST = 2400.0

Tell = Callable[[str], None]


class Docker:
    """The docker of this machine.

    Parameters
    ----------
    program
        What to run, such as ``"docker"``, ``"podman"`` or ``"finch"``.
    """

    def __init__(self, program: str = "docker") -> None:
        self.program = program

    def architectures(self) -> tuple[str, ...]:
        """Return for which architectures it can build; empty if it cannot be used at all."""
        if shutil.which(self.program) is None:
            return ()
        try:
            info = self._run("info", "--format", "{{json .}}")
        except ConfigError:
            return ()
        if not info.strip().startswith("{"):
            return ()
        found = json.loads(info)
        if not found.get("ServerVersion"):  # the client alone, without a daemon
            return ()
        own = "arm64" if found.get("Architecture") in ("aarch64", "arm64") else "x86_64"
        try:
            platforms = self._run("buildx", "inspect")
        except ConfigError:
            return (own,)
        return tuple(arch for arch in ARCHITECTURES if arch == own or f"linux/{IMAGE_ARCHITECTURES[arch]}" in platforms)

    def build(self, sources: Sources, name: str, arch: str) -> None:
        """Build the image of one architecture, with docker's own output."""
        with tempfile.TemporaryDirectory() as folder:
            sources.write(Path(folder))
            platform = f"linux/{IMAGE_ARCHITECTURES[arch]}"
            argument = f"PYTHON_VERSION={sources.python}"
            self._run("build", "--platform", platform, "--build-arg", argument, "--tag", name, folder, shown=True)

    def login(self, clients: Clients, repository: str) -> None:
        """Let docker push to the registry for the next hours."""
        with explained("ecr:GetAuthorizationToken", repository, "No image was pushed"):
            data = clients.client("ecr").get_authorization_token()["authorizationData"][0]
        user, _, password = base64.b64decode(data["authorizationToken"]).decode().partition(":")
        registry = repository.partition("/")[0]
        self._run("login", "--username", user, "--password-stdin", registry, given=password)

    def push(self, name: str) -> None:
        """Push an image, with docker's own output."""
        self._run("push", name, shown=True)

    def _run(self, *arguments: str, given: str | None = None, shown: bool = False) -> str:
        """Run docker; what it says goes to standard error if it is to be `shown`, so that --json stays clean."""
        try:
            done = subprocess.run(  # noqa: S603 - a program of the user's, without a shell
                [self.program, *arguments],
                input=given,
                stdout=_STDERR if shown else subprocess.PIPE,
                stderr=None if shown else subprocess.PIPE,
                text=True,
                check=False,
            )
        except OSError as error:
            raise ConfigError(f"{self.program} cannot be run: {error.strerror}. Nothing was pushed") from None
        if done.returncode:
            said = f": {done.stderr.strip().splitlines()[-1]}" if not shown and (done.stderr or "").strip() else ""
            raise ConfigError(
                f"`{self.program} {arguments[0]}` failed with exit code {done.returncode}{said}. Nothing was "
                "pushed. --codebuild builds at AWS instead"
            )
        return done.stdout or ""


def pushed(clients: Clients, stack: Stack, tags: Sequence[str]) -> set[str]:
    """Return which of `tags` the repository has."""
    found = set()
    for tag in tags:
        try:
            with explained("ecr:DescribeImages", stack.repository, "No image was pushed"):
                clients.client("ecr").describe_images(
                    repositoryName=repository_name(stack.repository), imageIds=[{"imageTag": tag}]
                )
            found.add(tag)
        except CloudError as error:
            if code_of(error) != "ImageNotFoundException":
                raise
    return found


def forget(clients: Clients, stack: Stack, tags: Sequence[str]) -> None:
    """Delete images of those tags, the index first; those that are not there do no harm."""
    for tag in tags:
        with explained("ecr:BatchDeleteImage", stack.repository, "No image was pushed"):
            clients.client("ecr").batch_delete_image(
                repositoryName=repository_name(stack.repository), imageIds=[{"imageTag": tag}]
            )


def build_at_aws(
    clients: Clients, stack: Stack, sources: Sources, archs: Sequence[str], clock: Clock, tell: Tell
) -> None:
    """Have CodeBuild build and push the images of some architectures, and wait.

    Raises
    ------
    CloudError
        A build failed, with the last lines that it said.
    """
    key = f"{SOURCES}{sources.tag}.zip"
    with explained("s3:PutObject", f"{stack.bucket}/{SOURCES}*", "No image was pushed"):
        clients.client("s3").put_object(Bucket=stack.bucket, Key=key, Body=sources.zipped())
    codebuild = clients.client("codebuild")
    builds = {}
    for arch in archs:
        kind, image = _BUILDERS[arch]
        variables = {"TAG": sources.tag_of(arch), "PYTHON_VERSION": sources.python}
        with explained("codebuild:StartBuild", f"the project {stack.builder}", "No image was pushed"):
            build = codebuild.start_build(
                projectName=stack.builder,
                sourceTypeOverride="S3",
                sourceLocationOverride=f"{stack.bucket}/{key}",
                environmentTypeOverride=kind,
                imageOverride=image,
                environmentVariablesOverride=[{"name": name, "value": value} for name, value in variables.items()],
            )["build"]
        builds[str(build["id"])] = arch
        tell(f"CodeBuild builds the image of {arch}: {build['id']}")
    _wait_for_builds(clients, builds, clock, tell)


def _wait_for_builds(clients: Clients, builds: dict[str, str], clock: Clock, tell: Tell) -> None:
    left, phases = dict(builds), dict.fromkeys(builds, "")
    until = clock.monotonic() + _LONGEST
    while left:
        with explained("codebuild:BatchGetBuilds", ", ".join(left), "The builds go on, and push what they build"):
            found = clients.client("codebuild").batch_get_builds(ids=list(left))["builds"]
        for build in found:
            id, phase = str(build["id"]), str(build.get("currentPhase", "")).lower()
            if phase != phases[id]:
                phases[id] = phase
                tell(f"{builds[id]}: {phase}")
            if build["buildStatus"] == "IN_PROGRESS":
                continue
            del left[id]
            if build["buildStatus"] != "SUCCEEDED":
                raise CloudError(
                    f"the image of {builds[id]} was not built ({build['buildStatus']}):\n{_last_lines(clients, build)}"
                    "\nNothing was pushed. Put it right, and run `burst image push` again"
                )
        if left and clock.monotonic() > until:
            raise WaitTimeout("the image was not built within 40 minutes. CodeBuild goes on; ask again later")
        if left:
            sync.run(clock.sleep(_POLL))


def publish(clients: Clients, stack: Stack, sources: Sources) -> tuple[str, ...]:
    """Make the tag of `sources` an index of the images that were pushed; return their architectures.

    Raises
    ------
    CloudError
        None was pushed.
    """
    ecr, name = clients.client("ecr"), repository_name(stack.repository)
    by_tag = {sources.tag_of(arch): arch for arch in ARCHITECTURES}
    with explained("ecr:BatchGetImage", stack.repository, "The images are pushed, but no index of them is"):
        images = ecr.batch_get_image(
            repositoryName=name, imageIds=[{"imageTag": tag} for tag in by_tag], acceptedMediaTypes=list(IMAGE_TYPES)
        )["images"]
    if not images:
        raise CloudError(f"no image of {sources.tag} is in {stack.repository}: run `burst image push` again")
    entries = {by_tag[str(image["imageId"]["imageTag"])]: _entry(image) for image in images}
    archs = tuple(arch for arch in ARCHITECTURES if arch in entries)
    for arch in archs:
        entries[arch]["platform"] = {"architecture": IMAGE_ARCHITECTURES[arch], "os": "linux"}
    index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [entries[arch] for arch in archs]}
    try:
        with explained("ecr:PutImage", stack.repository, "The images are pushed, but no index of them is"):
            ecr.put_image(
                repositoryName=name,
                imageManifest=json.dumps(index),
                imageManifestMediaType=INDEX_TYPE,
                imageTag=sources.tag,
            )
    except CloudError as error:
        if code_of(error) == "ImageAlreadyExistsException":
            return archs
        if code_of(error) != "ImageTagAlreadyExistsException":
            raise
        # Tags are immutable: an index with one architecture gives way to one with both.
        forget(clients, stack, [sources.tag])
        return publish(clients, stack, sources)
    return archs


def architectures_of(clients: Clients, uri: str, fetch: Callable[[str], bytes] | None = None) -> tuple[str, ...] | None:
    """Return the architectures of an image in ECR, in our words; None if there is no such image.

    An index names them. An image of one architecture has it in its configuration, which is a blob of its own.

    Parameters
    ----------
    fetch
        Gets a blob from the address that ECR gives; by default over HTTPS.
    """
    repository, _, tag = uri.rpartition(":")
    name, ecr = repository_name(repository), clients.client("ecr")
    with explained("ecr:BatchGetImage", uri):
        images = ecr.batch_get_image(
            repositoryName=name,
            imageIds=[{"imageTag": tag}],
            acceptedMediaTypes=[INDEX_TYPE, LIST_TYPE, *IMAGE_TYPES],
        )["images"]
    if not images:
        return None
    manifest = json.loads(images[0]["imageManifest"])
    if "manifests" in manifest:
        named = {entry.get("platform", {}).get("architecture") for entry in manifest["manifests"]}
    else:
        with explained("ecr:GetDownloadUrlForLayer", uri):
            found = ecr.get_download_url_for_layer(repositoryName=name, layerDigest=manifest["config"]["digest"])
        named = {json.loads((fetch or _fetch)(found["downloadUrl"]))["architecture"]}
    return tuple(arch for arch in ARCHITECTURES if IMAGE_ARCHITECTURES[arch] in named)


def _fetch(url: str) -> bytes:
    if not url.startswith("https://"):
        raise CloudError("ECR gave an address that is not HTTPS: the configuration of the image is not read")
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - HTTPS  # nosec B310
            return bytes(answer.read())
    except OSError as error:
        raise CloudUnavailable(f"the configuration of the image cannot be read: {error}") from None


def _entry(image: dict[str, Any]) -> dict[str, Any]:
    manifest = str(image["imageManifest"])
    kind = image.get("imageManifestMediaType") or json.loads(manifest).get("mediaType") or IMAGE_TYPES[0]
    return {"mediaType": kind, "digest": image["imageId"]["imageDigest"], "size": len(manifest.encode())}


def _last_lines(clients: Clients, build: dict[str, Any]) -> str:
    """Return the end of a build's log, or why it cannot be had."""
    logs = build.get("logs", {})
    if not logs.get("groupName") or not logs.get("streamName"):
        contexts = [one.get("message", "") for phase in build.get("phases", ()) for one in phase.get("contexts", ())]
        return "\n".join(filter(None, contexts)) or f"see {logs.get('deepLink', 'CodeBuild in the console')}"
    try:
        with explained("logs:GetLogEvents", logs["groupName"]):
            events = clients.client("logs").get_log_events(
                logGroupName=logs["groupName"], logStreamName=logs["streamName"], limit=20, startFromHead=False
            )["events"]
    except CloudError as error:
        return str(error)
    return "\n".join(event["message"].rstrip() for event in events)
