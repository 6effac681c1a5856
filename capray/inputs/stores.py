"""Whether a store answers at all: this distinguishes an object that cannot be read from a store that is away."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from fsspec.asyn import sync

from capray.inputs.witnesses import wait_until
from capray.storage import Location, is_unanswered

ANSWER_SECONDS = 60.0
"""The most this request may take, botocore's retries included."""

_asking = threading.Lock()


def wait_for_answer(place: Location, seconds: float, notify: Callable[[str], None]) -> bool:
    """Wait until the S3 store of ``place`` answers, whatever it says; whether that took time.

    Raises:
        TryAgain: it did not for ``seconds``.
    """
    bucket = place.fs.split_path(place.path)[0]
    what = f"the store of s3://{bucket} does not answer"
    way_out = f"and has not for {seconds:g} s: run the same command again when it does"
    with _asking:  # One asks; the others find out when it has.
        return wait_until(lambda: _answers(place.fs, bucket), what, way_out, seconds, notify)


def _answers(fs: Any, bucket: str) -> bool:
    async def ask() -> None:
        client = await fs.set_session()
        await client.head_bucket(Bucket=bucket)

    try:
        sync(fs.loop, ask, timeout=ANSWER_SECONDS)
    except Exception as error:
        return not is_unanswered(error)
    return True
