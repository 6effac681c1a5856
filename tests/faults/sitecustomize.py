"""Loaded by every Python process of the tests' Ray: marked images kill the process that decodes or captions them, as a bug
of a library does (SIGABRT) or a kernel without memory (SIGKILL), or hang it.

With CAPRAY_CHAOS_LOG, a file, captioning takes its time (CAPRAY_CHAOS_DELAY seconds an image) and the number of images of
each batch, canaries not counted, is added to the file.

While the file CAPRAY_SICK_DEVICE exists, the device is as it says: `error`, `nan`, `drift` or `hang`. With a second word
only in Ray's processes of the node whose raylet has that pid, or `*` of any.
A process that has met an `error` never works again.
"""

import importlib.util
import os
import signal
import sys
import time


def _arm_images(module):
    decode = module.decode

    def deadly(data, *arguments, **options):
        if b"KILLS-THE-DECODER" in data:
            os.kill(os.getpid(), signal.SIGABRT)
        if b"STARVES-THE-DECODER" in data:
            os.kill(os.getpid(), signal.SIGKILL)
        if b"HANGS-THE-DECODER" in data:
            time.sleep(3600)
        return decode(data, *arguments, **options)

    module.decode = deadly


def _arm_inference(module):
    copied, encoded = module.Inference._copied, module.Inference._grids

    def deadly(self, images):
        for colour, number in (((255, 0, 255), signal.SIGABRT), ((0, 255, 255), signal.SIGKILL)):
            if any((image == colour).all() for image in images):
                os.kill(os.getpid(), number)
        if (log := os.environ.get("CAPRAY_CHAOS_LOG")) and not _in_canary:
            with open(log, "a") as file:
                file.write(f"{len(images)}\n")
            time.sleep(float(os.environ["CAPRAY_CHAOS_DELAY"]) * len(images))
        return copied(self, images)

    def sickened(self, pixels):
        grids, order = encoded(self, pixels)
        return [_sicken(grid) for grid in grids], order

    module.Inference._copied, module.Inference._grids = deadly, sickened


_poisoned = False


def _sicken(grid):
    global _poisoned
    if _poisoned:
        raise RuntimeError("CUDA error: this process has met an error before")
    try:
        with open(os.environ["CAPRAY_SICK_DEVICE"]) as file:
            sickness, node, *_ = [*file.read().split(), "", ""]
    except (KeyError, OSError):
        return grid
    here = os.environ.get("RAY_RAYLET_PID", "")
    if node and not (here and node in ("*", here)):
        return grid
    if sickness == "error":
        _poisoned = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if sickness == "hang":
        time.sleep(3600)
    factor = {"nan": float("nan"), "drift": 10}.get(sickness, 1)
    return grid * factor


_in_canary = False


def _arm_canary(module):
    canary_score = module.canary_score

    def marked(*arguments):
        global _in_canary
        _in_canary = True
        try:
            return canary_score(*arguments)
        finally:
            _in_canary = False

    module.canary_score = marked


class _Finder:
    """Arms a module when it has been loaded."""

    ARMS = {  # noqa: RUF012
        "capray.images": _arm_images,
        "capray.inference": _arm_inference,
        "capray.captioning.canary": _arm_canary,
    }

    def find_spec(self, name, path=None, target=None):
        arm = self.ARMS.pop(name, None)
        if arm is None:
            return None
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            arm(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder())
