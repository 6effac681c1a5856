"""Loaded by every Python process of the tests' Ray: marked images kill the process that decodes or captions them.

With CAPRAY_CHAOS_LOG, a file, captioning takes its time (CAPRAY_CHAOS_DELAY seconds an image) and the number of images of
each batch is added to the file.
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
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(data, *arguments, **options)

    module.decode = deadly


def _arm_captioner(module):
    encode_all = module.Captioner.encode_all

    def deadly(self, images):
        if any(image.shape[-1] == 3 and (image == (255, 0, 255)).all() for image in images):
            os.kill(os.getpid(), signal.SIGKILL)
        if log := os.environ.get("CAPRAY_CHAOS_LOG"):
            with open(log, "a") as file:
                file.write(f"{len(images)}\n")
            time.sleep(float(os.environ["CAPRAY_CHAOS_DELAY"]) * len(images))
        return encode_all(self, images)

    module.Captioner.encode_all = deadly


class _Finder:
    """Arms a module when it has been loaded."""

    ARMS = {"capray.images": _arm_images, "capray.model.captioner": _arm_captioner}  # noqa: RUF012

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
