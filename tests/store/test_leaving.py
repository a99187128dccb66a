"""A process that ends right after a request ends cleanly (see `burst_dask.store.leaving`)."""

import subprocess
import sys

import boto3

PROGRAM = """
import asyncio, sys
from burst_dask.store import open_store

async def main(url):
    store = open_store(url)
    for number in range(20):
        await store.get(f"absent/{number}")
    waiting = [asyncio.ensure_future(store.get("absent/x")) for _ in range(8)]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)

asyncio.run(main(sys.argv[1]))
"""


def test_exit_status_is_zero(moto_server):
    """Four of ten such programs were aborted before."""
    boto3.client("s3", endpoint_url=moto_server, region_name="us-east-1").create_bucket(Bucket="leaving")
    url = f"s3://leaving/x?endpoint_url={moto_server}"
    for _ in range(8):
        done = subprocess.run([sys.executable, "-c", PROGRAM, url], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
