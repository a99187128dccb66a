"""As much of the stack as fleets on ECS need, in moto: so their tests do not hang on the whole template."""

from __future__ import annotations

import json

import boto3
from iam import ACCOUNT
from servers import REGION

BUCKET = "burst-dask-tests"
TEMPLATE = {
    "Parameters": {
        "InstanceTypesX86": {"Type": "CommaDelimitedList", "Default": "m5.large"},
        "InstanceTypesArm": {"Type": "CommaDelimitedList", "Default": "c6g.*,m6g.*"},
        "LeastVCpus": {"Type": "Number", "Default": 2},
        "MostVCpus": {"Type": "Number", "Default": 8},
    },
    "Resources": {
        "Cluster": {"Type": "AWS::ECS::Cluster", "Properties": {"ClusterName": "burst-dask"}},
        "LogGroup": {"Type": "AWS::Logs::LogGroup", "Properties": {"LogGroupName": "/burst-dask/burst-dask"}},
        "Bucket": {"Type": "AWS::S3::Bucket", "Properties": {"BucketName": BUCKET}},
        "Repository": {"Type": "AWS::ECR::Repository", "Properties": {"RepositoryName": "burst-dask"}},
    },
    "Outputs": {
        "Bucket": {"Value": BUCKET},
        "Cluster": {"Value": "burst-dask"},
        "LogGroup": {"Value": "/burst-dask/burst-dask"},
        "Repository": {"Value": f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/burst-dask"},
        "TaskRole": {"Value": f"arn:aws:iam::{ACCOUNT}:role/burst-dask-task"},
        "ExecutionRole": {"Value": f"arn:aws:iam::{ACCOUNT}:role/burst-dask-execution"},
        "Subnets": {"Value": "subnet-0000000a,subnet-0000000b"},
        "SecurityGroups": {"Value": "sg-0000000a"},
        "AssignPublicIp": {"Value": "ENABLED"},
        "Boundary": {"Value": f"arn:aws:iam::{ACCOUNT}:policy/burst-dask/burst-dask/boundary"},
        "CapacityProviderX86": {"Value": "burst-dask-x86"},
        "CapacityProviderX86Spot": {"Value": "burst-dask-x86-spot"},
        "CapacityProviderArm": {"Value": "burst-dask-arm"},
    },
}


def stand(moto: str) -> None:
    """Make the stack in moto, with an image."""
    formation = boto3.client("cloudformation", endpoint_url=moto, region_name=REGION)
    formation.create_stack(StackName="burst-dask", TemplateBody=json.dumps(TEMPLATE))
    push_image(moto, "burst-dask")


def push_image(moto: str, repository: str) -> None:
    """Have an image in a repository."""
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    manifest = json.dumps({"schemaVersion": 2, "mediaType": kind, "config": {}, "layers": []})
    ecr = boto3.client("ecr", endpoint_url=moto, region_name=REGION)
    ecr.put_image(repositoryName=repository, imageManifest=manifest, imageTag="0a1b2c")
