"""The HTTP side: photos in, captions out as JSON, and a page for people. Decodes; the replicas caption."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.metrics import Counter
from starlette.formparsers import MultiPartException, MultiPartParser

import capray
from capray.config import ImageLimits, Preprocessing
from capray.images import ImageError, load
from capray.report.explanation import region_of
from capray.report.rendering import render
from capray.vocabulary import without_end

_FORM_BYTES = 64 * 1024
"""What a form may hold beside the photo."""
_STATUS = {"too_large": 413, "not_an_image": 415, "unsupported_format": 415}
"""HTTP status by kind of failure; 422 for the other ways an image can be damaged."""


class Alternative(BaseModel):
    """A caption and how sure the captioner is of it."""

    caption: str
    log_prob: float = Field(description="natural logarithm of its probability, `<end>` included")
    score: float = Field(description="what captions are ranked by: log_prob after length normalisation")
    num_tokens: int
    finished: bool = Field(description="whether it ended by itself, and not at the greatest length")


class Attention(BaseModel):
    """Where the captioner looked at each word."""

    words: list[str]
    weights: list[list[float]] = Field(description="words x positions of a square grid, row by row")
    region: tuple[float, float, float, float] = Field(
        description="left, top, right and bottom of the grid as shares of the photo's width and height"
    )


class Answer(Alternative):
    """The best caption, the others, and the photo's size in pixels."""

    alternatives: list[Alternative]
    width: int
    height: int
    model_id: str
    batch_size: int = Field(description="photos captioned together with this one, itself included")
    attention: Attention | None = None


class Problem(BaseModel):
    """What is wrong with a request."""

    detail: str


app = FastAPI(
    title="capray",
    version=capray.__version__,
    description="Captions for photos.",
    docs_url=None,  # Its page would load scripts from elsewhere.
    redoc_url=None,
)
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "no photo in the request"},
    413: {"model": Problem, "description": "more bytes or pixels than allowed"},
    415: {"model": Problem, "description": "not an image, or none of the formats read"},
    422: {"model": Problem, "description": "a damaged image"},
    500: {"model": Problem, "description": "the captioner failed"},
    503: {"model": Problem, "description": "too many requests at once: try again"},
    504: {"model": Problem, "description": "took too long"},
}
_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {"image": {"type": "string", "format": "binary"}},
            }
        },
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}


@serve.ingress(app)
class Ingress:
    """Answers requests.

    Args:
        replicas: the handle of the replicas.
        model_id: their captioner's.
        preprocessing, limits: how photos are read.
        max_requests: photos in work at once; more are refused.
        timeout_seconds: after which a request is given up.
    """

    def __init__(
        self,
        replicas: Any,
        model_id: str,
        preprocessing: Preprocessing,
        limits: ImageLimits,
        max_requests: int,
        timeout_seconds: float,
    ):
        self.replicas, self.model_id = replicas, model_id
        self.preprocessing, self.limits = preprocessing, limits
        self.max_requests, self.timeout_seconds = max_requests, timeout_seconds
        self.in_work = 0
        self.answered_at = float("-inf")
        self.answers = Counter("capray_captions", description="Answers to /caption", tag_keys=("status",))
        self.html = render("serve.html", model_id=model_id, max_bytes=limits.max_image_bytes)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page(self) -> str:
        return self.html

    @app.get("/healthz")
    def healthz(self) -> dict[str, str]:
        """Whether the server runs."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"model": Problem, "description": "no replica answers"}})
    async def readyz(self) -> dict[str, str]:
        """Whether a replica answers, or is busy and did lately, and the captioner it has loaded."""
        try:
            model_id = await asyncio.wait_for(self.replicas.model_id.remote(), 5)
        except TimeoutError:
            if time.monotonic() - self.answered_at > self.timeout_seconds:
                raise HTTPException(503, "no replica has answered for a while") from None
            model_id = self.model_id
        except Exception as error:
            raise HTTPException(503, f"no replica answers: {error}") from error
        return {"status": "ready", "model_id": model_id}

    @app.post("/caption", response_model_exclude_none=True, responses=_PROBLEMS, openapi_extra={"requestBody": _BODY})
    async def caption(
        self, request: Request, attention: bool = Query(False, description="with the attention at each word")
    ) -> Answer:
        """Caption a photo: the body is the image itself, or a form with the file `image`."""
        if self.in_work >= self.max_requests:
            self.answers.inc(tags={"status": "503"})
            raise HTTPException(503, f"{self.in_work} photos are in work: try again", {"Retry-After": "1"})
        self.in_work += 1
        try:
            answer = await asyncio.wait_for(self._caption(request, attention), self.timeout_seconds)
        except TimeoutError:
            self.answers.inc(tags={"status": "504"})
            raise HTTPException(504, f"not done within {self.timeout_seconds:g} s") from None
        except HTTPException as error:
            self.answers.inc(tags={"status": str(error.status_code)})
            raise
        except RayActorError:
            self.answers.inc(tags={"status": "503"})
            raise HTTPException(503, "a replica has died: try again", {"Retry-After": "5"}) from None
        except Exception as error:
            self.answers.inc(tags={"status": "500"})
            logging.getLogger("ray.serve").exception("captioning failed")
            raise HTTPException(500, f"the captioner failed ({type(error).__name__})") from error
        finally:
            self.in_work -= 1
        self.answers.inc(tags={"status": "200"})
        self.answered_at = time.monotonic()
        return answer

    async def _caption(self, request: Request, attention: bool) -> Answer:
        data = await self._read(request)
        try:
            pixels, width, height = await asyncio.to_thread(load, data, self.preprocessing, self.limits)
        except ImageError as error:
            raise HTTPException(_STATUS.get(error.kind, 422), f"{error.kind}: {error.message}") from error
        del data
        row = {"pixels": pixels.tobytes(), "input_height": pixels.shape[0], "input_width": pixels.shape[1]}
        try:
            found = await self._captioned(row)
        except BackPressureError as error:
            raise HTTPException(503, "too many photos wait: try again", {"Retry-After": "1"}) from error
        if isinstance(found, str):
            raise HTTPException(500, found)
        best, *others = ({key: getattr(h, key) for key in Alternative.model_fields} for h in found["hypotheses"])
        answer = Answer(
            **best,
            alternatives=[Alternative(**other) for other in others],
            width=width,
            height=height,
            model_id=self.model_id,
            batch_size=found["batch"],
        )
        if attention and found["attention"] is not None:
            words = without_end(found["tokens"])
            region = region_of(width, height, self.preprocessing)
            answer.attention = Attention(words=words, weights=found["attention"][: len(words)], region=region)
        return answer

    async def _captioned(self, row: dict[str, Any]) -> Any:
        """What a replica says of ``row``; a request given up gives up its place there too."""
        response = self.replicas.caption.remote(row)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def _read(self, request: Request) -> bytes:
        """The photo in ``request``, of which no more is read than may be."""
        kind = request.headers.get("content-type", "")
        is_form = kind.startswith("multipart/form-data")
        limit = self.limits.max_image_bytes + (_FORM_BYTES if is_form else 0)
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise HTTPException(413, f"too_large: more than {self.limits.max_image_bytes:,} bytes")
        if not is_form:
            if not body:
                raise HTTPException(400, "the request holds no photo: send its bytes, or a form with the file `image`")
            return bytes(body)

        async def once() -> AsyncGenerator[bytes]:
            yield bytes(body)

        try:
            form = await MultiPartParser(request.headers, once(), max_files=1, max_fields=8).parse()
        except (MultiPartException, KeyError) as error:
            raise HTTPException(400, f"the form cannot be read: {error}") from error
        image = form.get("image")
        if image is None or isinstance(image, str):
            raise HTTPException(400, "the form has no file `image`")
        return await image.read()
