"""Real servers of S3's protocol on loopback: moto, which remembers nothing, and
SeaweedFS, which has a disk.
"""

import sys
import urllib.error
import urllib.request
from pathlib import Path

import certifi
import pytest

from index_jobs.index.stores import index_path
from tests.support.processes import ServerProcess, free_port

ACCESS = {
    "AWS_ACCESS_KEY_ID": "any",
    "AWS_SECRET_ACCESS_KEY": "any",
    "AWS_REGION": "us-east-1",
}
ACCESS["SSL_CERT_FILE"] = certifi.where()  # obstore does not start without certificates
_PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
)
_PARTS = (
    "-master.telemetry=false",
    "-s3",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-master.volumeSizeLimitMB=64",
)


class ObjectStore(ServerProcess):
    """A server with a bucket. environment: variables that lead obstore to it. folder:
    of SeaweedFS; None for moto.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {**ACCESS, "AWS_ENDPOINT_URL": self.url}
        command = [
            sys.executable,
            "-m",
            "moto.server",
            "-H",
            "127.0.0.1",
            "-p",
            str(self.port),
        ]
        if folder is not None:
            ports = [f"-{name}={free_port()}" for name in (*_PORTS, "s3.port.grpc")]
            here = [
                f"-dir={folder}",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                f"-s3.port={self.port}",
            ]
            command = [
                str(Path(sys.executable).with_name("weed")),
                "server",
                *here,
                *_PARTS,
                *ports,
            ]
        super().__init__(command)

    def responds(self) -> bool:
        """Create the bucket, and return True once the server responds."""
        try:
            urllib.request.urlopen(
                urllib.request.Request(f"{self.url}/bucket", method="PUT"), timeout=5
            ).close()
        except urllib.error.HTTPError as error:
            # of SeaweedFS, which creates buckets when they are used
            return error.code == 403
        except OSError:
            return False
        return True


class Machines:
    """Machines with a disk each: the mirrors of one index in a store."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        self.url = url

    def cache(self, name: str) -> dict[str, str]:
        return {"DCAR_RUNTIME_CACHE": str(self._folder / name)}

    def __getitem__(self, name: str) -> Path:
        """The mirror on the machine of a name."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DCAR_RUNTIME_CACHE", str(self._folder / name))
            return index_path(self.url)
