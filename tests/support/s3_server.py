"""A local S3 server: moto's, as a process."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from support.daemons import Daemon, free_port, listens

needs_s3 = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("moto", "s3fs", "flask"))), reason="moto or s3fs is not installed"
)
"""Skips a test if there is no S3 server, or no client of one."""
BUCKET = "models"


class S3Server(Daemon):
    """An S3 server with one bucket, `models`, on a free loopback port.

    Args:
        log: File for its log.

    Attributes:
        env: Environment in which clients find it.
    """

    def __init__(self, log: Path) -> None:
        import boto3

        port = free_port()
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        super().__init__(command, log, lambda: listens(port))
        self.env = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            # One try: an absent server is found at once.
            "AWS_MAX_ATTEMPTS": "1",
            "NO_PROXY": f"127.0.0.1,{os.environ.get('NO_PROXY', '')}",
        }
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=self.env["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",  # noqa: S106
            region_name="us-east-1",
        )
        self._client.create_bucket(Bucket=BUCKET)

    def put(self, key: str, content: bytes, **options: str) -> None:
        """Writes an object."""
        self._client.put_object(Bucket=BUCKET, Key=key, Body=content, **options)

    def names(self, prefix: str) -> list[str]:
        """Returns the names of the objects below a prefix, such as "folder/", without it."""
        found = self._client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return [each["Key"].removeprefix(prefix) for each in found]

    def get(self, key: str) -> bytes:
        """Reads an object."""
        content: bytes = self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return content

    def upload(self, folder: Path, prefix: str) -> None:
        """Writes every file of a bundle, the manifest last."""
        for file in sorted(folder.iterdir(), key=lambda file: file.name == "manifest.json"):
            self.put(f"{prefix}/{file.name}", file.read_bytes())

    def remove(self, key: str) -> None:
        """Removes an object."""
        self._client.delete_object(Bucket=BUCKET, Key=key)

    def kill(self) -> None:
        """Ends the server."""
        self._client.close()
        super().kill()
