"""Where files are kept, and how they are written so that nothing half done is ever taken for a result."""

import os
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the checkout: the book lies beside the package


def cache_folder() -> Path:
    """Where models and finished work are kept: $TILT_CACHE, else ~/.cache/tiltlib."""
    return Path(os.environ.get("TILT_CACHE") or Path.home() / ".cache" / "tiltlib")


def write_atomically(path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part. Makes the folder if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
