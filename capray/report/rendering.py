"""Pages that hold all they show: HTML from the folder `templates`, with their styles and pictures inside."""

from __future__ import annotations

import base64
import functools
import io
from typing import Any

from PIL import Image


@functools.cache
def _environment():
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("capray", "report/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> str:
    """The page of ``template``; ``values`` are escaped."""
    return _environment().get_template(template).render(**values)


def encoded(image: Image.Image, image_format: str) -> bytes:
    """``image`` as a JPEG or PNG."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **({"quality": 85} if image_format == "JPEG" else {}))
    return buffer.getvalue()


def data_uri(data: bytes, image_format: str) -> str:
    """An encoded JPEG or PNG as the source of an ``<img>``."""
    return f"data:image/{image_format.lower()};base64,{base64.b64encode(data).decode()}"
