"""The build backend: setuptools, with the lesson guests built first so that they are in every wheel."""

import subprocess
import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

HERE = Path(__file__).resolve().parent


def _build_guests() -> None:
    subprocess.run([sys.executable, str(HERE / "build.py")], check=True)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):  # type: ignore[no-untyped-def]
    _build_guests()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):  # type: ignore[no-untyped-def]
    _build_guests()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
