"""How tests carry out starts of a fleet on ECS, and what ECS answers to them."""

import asyncio
import itertools

NUMBERS = itertools.count(100)
THROTTLED = (400, "ThrottlingException", "Rate exceeded")
EXPIRED = (400, "ExpiredTokenException", "The security token included in the request is expired")
UNKNOWN_ROLE = (400, "ClientException", "ECS was unable to assume the role 'arn:aws:iam::1:role/x' that was provided")
FULL = "You've reached the limit on the number of vCPUs you can run concurrently"


def not_started(reason):
    """Return the answer to a RunTask that starts nothing."""
    return {"tasks": [], "failures": [{"reason": reason}]}


def start(fleet, workers):
    """Carry out another start."""
    asyncio.run(fleet.begin(next(NUMBERS), workers))
