"""What IAM would say: policies evaluated as its documentation has it, as far as ours go; and the template's, filled in.

An action is allowed if a statement allows it and none denies it; with a boundary, if both do. What is not known here (a
condition operator, a function of the template) raises, and never counts as allowed.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from burst_dask.aws.assets import asset

ACCOUNT, REGION, STACK, BUCKET = "123456789012", "us-east-1", "burst-dask", "burst-dask-123456789012-us-east-1"
ARN = f"arn:aws:{{}}:{REGION}:{ACCOUNT}:"
CLUSTER = f"{ARN.format('ecs')}cluster/{STACK}"


# ---------------------------------------------------------------------------- IAM


def allows(document: Mapping[str, Any], action: str, resource: str, **context: str) -> bool:
    """Tell whether a policy allows an action. Keys of the context have ``__`` for ``:``, and ``_`` for ``-``."""
    found = {name.replace("__", ":").replace("_", "-"): value for name, value in context.items()}
    return decided(document["Statement"], action, resource, found)


def decided(statements: Iterable[Mapping[str, Any]], action: str, resource: str, context: Mapping[str, str]) -> bool:
    effects = {one["Effect"] for one in statements if _fits(one, action, resource, context)}
    assert effects <= {"Allow", "Deny"}
    return effects == {"Allow"}


def _fits(statement: Mapping[str, Any], action: str, resource: str, context: Mapping[str, str]) -> bool:
    assert set(statement) <= {"Sid", "Effect", "Action", "Resource", "Condition"}, statement
    return (
        any(_like(pattern.lower(), action.lower()) for pattern in listed(statement["Action"]))
        and any(_like(pattern, resource) for pattern in listed(statement["Resource"]))
        and all(
            _holds(operator, context.get(key), listed(values))
            for operator, pairs in statement.get("Condition", {}).items()
            for key, values in pairs.items()
        )
    )


def _holds(operator: str, value: str | None, patterns: list[str]) -> bool:
    name = operator.removesuffix("IfExists")
    if value is None:
        return name != operator
    if name == "StringEquals":
        return value in patterns
    if name in ("StringLike", "ArnEquals", "ArnLike"):
        return any(_like(pattern, value) for pattern in patterns)
    raise NotImplementedError(operator)


def _like(pattern: str, value: str) -> bool:
    """IAM's wildcards: a star stands for any letters, slashes too, a question mark for one, brackets for themselves."""
    return fnmatch.fnmatchcase(value, pattern.replace("[", "[[]"))


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# ---------------------------------------------------------------------------- the template


class _Loader(yaml.SafeLoader):
    pass


def _tag(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return {suffix: loader.construct_scalar(node)}
    if isinstance(node, yaml.SequenceNode):
        return {suffix: loader.construct_sequence(node, deep=True)}
    return {suffix: loader.construct_mapping(node, deep=True)}


_Loader.add_multi_constructor("!", _tag)
TEMPLATE = yaml.load(asset("stack.yaml").read_text(), _Loader)


class Filled:
    """The template as CloudFormation fills it in, with parameters that differ from the defaults."""

    def __init__(self, stack: str = STACK, **parameters: Any) -> None:
        self.stack = stack
        self.parameters = {name: one.get("Default", "") for name, one in TEMPLATE["Parameters"].items()}
        self.parameters |= {"BucketName": BUCKET, "Vpc": "vpc-1", "Subnets": ["subnet-1"], "AssignPublicIp": "ENABLED"}
        self.parameters |= parameters
        self.parameters |= {
            "AWS::Partition": "aws",
            "AWS::Region": REGION,
            "AWS::AccountId": ACCOUNT,
            "AWS::StackName": stack,
        }

    def properties(self, name: str) -> Any:
        resource = TEMPLATE["Resources"][name]
        assert self.holds(resource.get("Condition")), f"there is no {name}"
        return self(resource["Properties"])

    def has(self, name: str) -> bool:
        return self.holds(TEMPLATE["Resources"][name].get("Condition"))

    def statements(self, role: str) -> list[dict[str, Any]]:
        """Return what a role may do, by all its policies."""
        found = [
            one for policy in self.properties(role).get("Policies", ()) for one in policy["PolicyDocument"]["Statement"]
        ]
        for name, resource in TEMPLATE["Resources"].items():
            if resource["Type"] == "AWS::IAM::Policy" and self.has(name):
                properties = self.properties(name)
                if role in properties["Roles"]:
                    found += properties["PolicyDocument"]["Statement"]
        return found

    def may(self, role: str, action: str, resource: str, **context: str) -> bool:
        return allows({"Statement": self.statements(role)}, action, resource, **context)

    def holds(self, condition: str | None) -> bool:
        return condition is None or self(TEMPLATE["Conditions"][condition]) is True

    def __call__(self, node: Any) -> Any:
        if isinstance(node, list):
            found = [self(one) for one in node]
            return [one for one in found if one is not Filled]
        if not isinstance(node, dict):
            return node
        if len(node) == 1 and (function := _FUNCTIONS.get(next(iter(node)))):
            return function(self, next(iter(node.values())))
        return {key: value for key, one in node.items() if (value := self(one)) is not Filled}

    def ref(self, name: str) -> Any:
        if name == "AWS::NoValue":
            return Filled  # is left out
        if name in self.parameters:
            return self.parameters[name]
        assert name in TEMPLATE["Resources"], name
        kind = TEMPLATE["Resources"][name]["Type"]
        named = {
            "AWS::ECS::Cluster": self.stack,
            "AWS::ECS::TaskDefinition": f"{ARN.format('ecs')}task-definition/{self.stack}-healer:1",
        }
        if kind == "AWS::Logs::LogGroup":
            return self(TEMPLATE["Resources"][name]["Properties"]["LogGroupName"])
        return named.get(kind, name)

    def attribute(self, path: str) -> str:
        name, _, attribute = path.partition(".")
        kind = TEMPLATE["Resources"][name]["Type"]
        if attribute != "Arn":
            return f"{name}-{attribute}"
        if kind == "AWS::IAM::Role":
            return f"arn:aws:iam::{ACCOUNT}:role/{self.stack}-{name}"
        return f"{ARN.format('ecs')}cluster/{self.stack}" if kind == "AWS::ECS::Cluster" else f"{ARN.format('x')}{name}"

    def text(self, text: str) -> str:
        def value(match: re.Match[str]) -> str:
            name = match.group(1)
            return self.attribute(name) if "." in name else str(self.ref(name))

        return re.sub(r"\$\{([\w:.]+)\}", value, text)


_FUNCTIONS: dict[str, Any] = {
    "Ref": Filled.ref,
    "GetAtt": Filled.attribute,
    "Sub": Filled.text,
    "If": lambda filled, one: filled(one[1] if filled.holds(one[0]) else one[2]),
    "Not": lambda filled, one: not filled(one[0]),
    "Equals": lambda filled, one: str(filled(one[0])) == str(filled(one[1])),
    "Join": lambda filled, one: one[0].join(listed(filled(one[1]))),
}


def output(stack: Filled) -> dict[str, str]:
    """Return the outputs of the stack, as DescribeStacks tells them."""
    return {name: stack(one["Value"]) for name, one in TEMPLATE["Outputs"].items() if stack.holds(one.get("Condition"))}
