"""The build backend: setuptools, with the lesson guests built first so that they are in every wheel.

A wheel carries them in kvmpy/lessons_data/, which exists only while it is built. An editable installation uses the
checkout's own.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

HERE = Path(__file__).resolve().parent
LESSONS_DATA = HERE.parent / "kvmpy" / "lessons_data"


def _build_guests(*arguments: str) -> None:
    subprocess.run([sys.executable, str(HERE / "build.py"), *arguments], check=True)


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Build the wheel (PEP 517), the lessons in it; return its name."""
    try:
        _build_guests("--install", str(LESSONS_DATA))
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    finally:
        shutil.rmtree(LESSONS_DATA, ignore_errors=True)


def build_editable(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Build the wheel of an editable installation (PEP 660); return its name."""
    _build_guests()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
