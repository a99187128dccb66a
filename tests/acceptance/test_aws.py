"""AWS in five commands: set up, build the image, look whether workers can run, look again, and remove it all.

The account is moto, and docker a script that pushes to it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig

import boto3
import pytest
import servers

DOCKER = f"""#!{sys.executable}
import json, sys
import boto3
words = sys.argv[1:]
if words[0] == "info":
    print(json.dumps({{"ServerVersion": "28", "Architecture": "x86_64"}}))
if words[0] == "buildx":
    print("Platforms: linux/amd64, linux/arm64")
if words[0] == "push":
    repository, _, tag = words[1].partition("/")[2].partition(":")
    kind = "application/vnd.oci.image.manifest.v1+json"
    manifest = {{"schemaVersion": 2, "mediaType": kind, "config": {{"digest": "sha256:" + tag}}, "layers": []}}
    boto3.client("ecr").put_image(
        repositoryName=repository, imageManifest=json.dumps(manifest), imageTag=tag, imageManifestMediaType=kind
    )
"""


@pytest.fixture
def endpoint(aws_credentials, tmp_path, monkeypatch):
    """An account of its own, whose default VPC has a way to the internet."""
    with servers.moto(tmp_path / "log") as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_REGION", servers.REGION)
        monkeypatch.setenv("AWS_DEFAULT_REGION", servers.REGION)
        ec2 = boto3.client("ec2")
        (vpc,) = [one["VpcId"] for one in ec2.describe_vpcs()["Vpcs"]]
        gateway = ec2.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
        ec2.attach_internet_gateway(InternetGatewayId=gateway, VpcId=vpc)
        (table,) = [one["RouteTableId"] for one in ec2.describe_route_tables()["RouteTables"]]
        ec2.create_route(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0", GatewayId=gateway)
        yield endpoint


@pytest.fixture
def burst(endpoint, tmp_path):
    """The command, where there is a docker; returns its exit code and what it prints."""
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}

    def run(*arguments):
        command = [sys.executable, "-m", "burst_dask.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


def test_from_nothing_to_nothing(burst):
    code, said = burst("doctor", "aws")
    assert code == 1 and "there is none: run `burst setup aws" in said

    code, said = burst("setup", "aws", "--yes")
    assert code == 0, said
    assert "create  Bucket" in said and "The stack burst-dask stands." in said and "burst image push" in said

    code, said = burst("doctor", "aws")
    assert code == 1 and "is empty: run `burst image push`" in said

    code, said = burst("image", "push")
    assert code == 0 and "for x86_64 and arm64 (built x86_64 and arm64)" in said

    code, said = burst("doctor", "aws")
    assert code == 0, said
    assert said.endswith("workers can run\n")

    code, said = burst("setup", "aws", "--json")
    assert (code, json.loads(said)["changed"]) == (0, False)

    code, said = burst("teardown", "aws", "--yes")
    assert code == 0 and "is kept, and `burst setup aws` finds it again" in said
    assert burst("teardown", "aws", "--yes") == (0, "there is no stack burst-dask in us-east-1\n")
