"""One image's bytes from storage: typed failures, and another attempt at what may pass. Knows nothing of plans or Ray."""

from __future__ import annotations

import errno

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from capray.errors import CaprayError
from capray.images import ImageError
from capray.storage import Location, locate


def _is_passing(error: BaseException) -> bool:
    """Whether another attempt at reading may succeed: anything but what the store says of the object itself."""
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
        return False
    return isinstance(error, OSError) or _is_remote(error)


def _is_remote(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in ("botocore", "aiobotocore", "s3fs", "aiohttp", "asyncio")


def read_image(uri: str, max_bytes: int) -> bytes:
    """The bytes at ``uri``, at most one more than ``max_bytes``. What may pass is tried again, with backoff and jitter.

    Raises:
        ImageError: of kind missing, denied or unreadable_storage.
    """
    retrying = Retrying(
        retry=retry_if_exception(_is_passing),
        stop=stop_after_attempt(4),
        wait=wait_exponential_jitter(initial=0.2, max=10, jitter=0.5),
        reraise=True,
    )
    try:
        return retrying(_read, locate(uri), max_bytes)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ImageError("missing", str(error)) from error
    except PermissionError as error:
        raise ImageError("denied", str(error)) from error
    except CaprayError as error:
        raise ImageError("unreadable_storage", str(error)) from error
    except Exception as error:
        if isinstance(error, OSError) or _is_remote(error):
            raise ImageError("unreadable_storage", f"{type(error).__name__}: {error}") from error
        raise


def _read(place: Location, max_bytes: int) -> bytes:
    try:
        return place.fs.cat_file(place.path, start=0, end=max_bytes + 1)
    except OSError as error:
        # An empty object has no range to give (HTTP 416).
        if error.errno == errno.EINVAL or "InvalidRange" in str(error):
            return place.fs.cat_file(place.path)
        raise
