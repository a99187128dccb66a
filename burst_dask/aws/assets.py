"""Files of the repository's ``worker/`` folder: the template, the Dockerfile, the lock. A wheel carries them along."""

from __future__ import annotations

from pathlib import Path

from burst_dask.errors import ConfigError

TEMPLATE = "stack.yaml"
DOCKERFILE = "Dockerfile"
LOCK = "requirements.lock"
_HERE = Path(__file__).parent


def asset(name: str) -> Path:
    """Return the path of a file of ``worker/``, in a checkout as well as in an installed wheel.

    Raises
    ------
    ConfigError
        The installation lacks it.

    Examples
    --------
    >>> asset("stack.yaml").read_text().splitlines()[2]
    'AWSTemplateFormatVersion: "2010-09-09"'
    """
    for folder in (_HERE / "files", _HERE.parents[1] / "worker"):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"this installation of burst_dask lacks {name}; install it again: pip install 'burst-dask[aws]'")
