"""Where workers run: subnets that `burst setup aws` chooses, and ways out of them."""

from __future__ import annotations


def test_no_default_vpc(account, burst):
    account.answers("ec2:DescribeVpcs", {"Vpcs": [{"VpcId": "vpc-1", "IsDefault": False}]})
    shown = burst("setup", "aws", "--yes")
    assert shown.exit_code == 1
    assert shown.output == (
        "Error: us-east-1 has no default VPC. Choose one of its others by --vpc: vpc-1. Or create the default one by "
        "`aws ec2 create-default-vpc --region us-east-1`, which is free. Nothing was changed\n"
    )


def test_subnets_without_a_way_out(account, burst):
    ec2 = account.clients.client("ec2")
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.1.0/24")["Subnet"]["SubnetId"]
    shown = burst("setup", "aws", "--yes", "--vpc", vpc)
    assert shown.exit_code == 1 and f"from {subnet} no image can be fetched" in shown.output
    assert "--private-endpoints" in shown.output
    assert burst("setup", "aws", "--yes", "--vpc", vpc, "--private-endpoints").exit_code == 0
    assert (account.sent()["PrivateEndpoints"], account.sent()["AssignPublicIp"]) == ("true", "DISABLED")


def test_subnets_behind_a_nat_need_no_public_address(account, burst):
    ec2 = account.clients.client("ec2")
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    public = ec2.describe_subnets()["Subnets"][0]["SubnetId"]
    zone = ec2.describe_subnets()["Subnets"][0]["AvailabilityZone"]
    private = ec2.create_subnet(VpcId=vpc, CidrBlock="172.31.200.0/24", AvailabilityZone=zone)["Subnet"]["SubnetId"]
    address = ec2.allocate_address(Domain="vpc")["AllocationId"]
    nat = ec2.create_nat_gateway(SubnetId=public, AllocationId=address)["NatGateway"]["NatGatewayId"]
    table = ec2.create_route_table(VpcId=vpc)["RouteTable"]["RouteTableId"]
    ec2.create_route(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0", NatGatewayId=nat)
    ec2.associate_route_table(RouteTableId=table, SubnetId=private)
    burst("setup", "aws", "--yes")
    sent = account.sent()
    assert (sent["Subnets"], sent["AssignPublicIp"], sent["RouteTables"]) == (private, "DISABLED", table)


def test_an_endpoint_that_is_there_is_not_made_again(account, burst):
    ec2 = account.clients.client("ec2")
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    (table,) = [one["RouteTableId"] for one in ec2.describe_route_tables()["RouteTables"]]
    ec2.create_vpc_endpoint(VpcId=vpc, ServiceName="com.amazonaws.us-east-1.s3", RouteTableIds=[table])
    burst("setup", "aws", "--yes")
    assert account.sent()["RouteTables"] == ""


def test_the_stacks_own_endpoint_is_not_taken_for_somebody_elses(stack, burst):
    """Where it has no tag that tells, the stack would delete it, and its workers had no free way to S3."""
    before = stack.has()
    assert before["RouteTables"]
    untagged = stack.clients.client("ec2").describe_vpc_endpoints()["VpcEndpoints"]
    stack.answers("ec2:DescribeVpcEndpoints", {"VpcEndpoints": [one | {"Tags": []} for one in untagged]})
    burst("setup", "aws", "--dry-run", "--subnets", before["Subnets"])
    assert stack.sent()["RouteTables"] == before["RouteTables"]


def test_more_subnets_than_a_page_has(account, burst):
    found = account.clients.client("ec2").describe_subnets()["Subnets"]
    pages = {None: {"Subnets": found[:4], "NextToken": "more"}, "more": {"Subnets": found[4:]}}
    account.answers("ec2:DescribeSubnets", lambda asked: pages[asked.get("NextToken")])
    burst("setup", "aws", "--dry-run")
    assert len(account.sent()["Subnets"].split(",")) == len(found) == 6


def test_no_such_subnet(account, burst):
    shown = burst("setup", "aws", "--yes", "--subnets", "subnet-00000000")
    assert shown.exit_code == 1 and "aws ec2 describe-subnets" in shown.output
