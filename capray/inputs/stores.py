"""Whether a store answers at all: what tells an object that cannot be read from a store that is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from fsspec.asyn import sync

from capray.errors import TryAgain
from capray.storage import Location

POLL_SECONDS = 2.0
ANSWER_SECONDS = 60.0
"""As long may the question take, all of botocore's attempts together."""

_asking = threading.Lock()


def wait_for_answer(place: Location, seconds: float, notify: Callable[[str], None]) -> bool:
    """Wait until the S3 store of ``place`` answers, whatever it says; whether that took time.

    Raises:
        TryAgain: it did not for ``seconds``.
    """
    bucket = place.fs.split_path(place.path)[0]
    deadline, has_waited = time.monotonic() + seconds, False
    with _asking:  # One asks; the others find out when it has.
        while not _answers(place.fs, bucket):
            what = f"the store of s3://{bucket} does not answer"
            if time.monotonic() >= deadline:
                raise TryAgain(
                    f"{what}, and has not for {seconds:g} s: run the same command again when it does; nothing was recorded "
                    "against its images"
                )
            if not has_waited:
                notify(f"waiting: {what}")
                has_waited = True
            time.sleep(min(POLL_SECONDS, max(0.01, deadline - time.monotonic())))
    return has_waited


def _answers(fs: Any, bucket: str) -> bool:
    from botocore.exceptions import ClientError

    async def ask() -> None:
        client = await fs.set_session()
        await client.head_bucket(Bucket=bucket)

    try:
        sync(fs.loop, ask, timeout=ANSWER_SECONDS)
    except ClientError as error:
        return error.response["ResponseMetadata"].get("HTTPStatusCode", 500) < 500
    except Exception:
        return False
    return True
