"""What the two programs that take the guides' pictures share: a free port, a server that is up, Chromium.

Needs Chromium (Debian: apt-get install chromium) and Pillow.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image

UP_S = 120.0
Box = tuple[int, int, int, int]  # left, upper, right, lower, in pixels


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait(address: str) -> None:
    """Until a server answers; raises TimeoutError."""
    deadline = time.monotonic() + UP_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise TimeoutError(address)


def take(address: str, path: Path, *, size: tuple[int, int], crop: Box, settle_ms: int, colours: int) -> None:
    """Take one picture of a page once `settle_ms` of the browser's own clock have passed."""
    width, height = size
    with tempfile.TemporaryDirectory() as folder:
        taken = Path(folder) / "taken.png"
        command = [shutil.which("chromium") or "chromium", "--headless", "--no-sandbox", "--disable-gpu"]
        command += ["--disable-dev-shm-usage", f"--user-data-dir={folder}", "--hide-scrollbars"]
        command += [f"--window-size={width},{height}", f"--virtual-time-budget={settle_ms}"]
        subprocess.run([*command, f"--screenshot={taken}", address], check=True, timeout=180)
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(taken) as picture:
            picture.convert("RGB").crop(crop).quantize(colours).save(path, optimize=True)
