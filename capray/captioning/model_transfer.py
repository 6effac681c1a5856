"""A captioner on the driver's disk, for actors on other nodes: its files travel through Ray's object store.

One on S3 does not need it: every actor reads it from there.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from typing import Any

from capray.model.captioner_files import FILES
from capray.storage import exists, locate, read_bytes, write_atomic


@dataclass(frozen=True)
class ModelTransfer:
    """The files of the captioner in ``folder`` of the node ``node_id``.

    The driver that made it has to keep it as long as actors may start.
    """

    folder: str
    model_id: str
    node_id: str
    files: tuple[Any, ...]
    """References to the contents of FILES, in their order."""

    def local_folder(self) -> str:
        """A folder of this node with the captioner: the original on the driver's node, elsewhere a copy, made once."""
        import ray

        if ray.get_runtime_context().get_node_id() == self.node_id:
            return self.folder
        copies = os.path.join(tempfile.gettempdir(), f"capray-models-{os.getuid()}")
        os.makedirs(copies, mode=0o700, exist_ok=True)
        copy = locate(os.path.join(copies, self.model_id))
        for name, reference in zip(FILES, self.files, strict=True):
            if not exists(copy.join(name)):
                write_atomic(copy.join(name), ray.get(reference))
        return copy.path


def transfer_model(model: str, model_id: str) -> ModelTransfer | None:
    """The transfer of the captioner in ``model``; None where it is no folder of this machine."""
    import ray

    place = locate(model)
    if not place.is_local:
        return None
    files = tuple(ray.put(read_bytes(place.join(name))) for name in FILES)
    return ModelTransfer(place.path, model_id, ray.get_runtime_context().get_node_id(), files)
