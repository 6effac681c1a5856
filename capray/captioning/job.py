"""The captioning job: what it needs is opened (``opening.py``), the output leased, and a run does the work (``run.py``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from capray.captioning.lease import Lease, ray_job_is_terminal
from capray.captioning.opening import open_job
from capray.captioning.record import Summary
from capray.captioning.signals import Signals
from capray.config import CaptionConfig
from capray.progress import ProgressDisplay

if TYPE_CHECKING:
    from capray.captioning.stream import Executor


def caption(config: CaptionConfig, executor: Executor | None = None) -> Summary:
    """Caption every image of the input that has no caption yet.

    Args:
        executor: what runs the passes; Ray Data when not given.

    Raises:
        ConfigError: settings, input or output that cannot be used.
        LeaseHeldError: another run writes the output.
        CheckpointError: the model cannot be loaded.
        StorageError: storage that cannot be reached or written.
        TryAgain: a temporary fault: a mount, device or store that is away, ids that stay unaccounted for.
        Interrupted: stopped by Ctrl-C or SIGTERM, what was done being published.
        CaprayError: everything fails, or files of the input cannot be read.
    """
    job = open_job(config)

    from capray.captioning.run import Run
    from capray.captioning.stream import RayExecutor

    run_id = job.output.new_run_id()
    lease = Lease(
        job.output.private, steal=config.steal_lease, enforce=not config.unsafe_no_lease, is_job_terminal=ray_job_is_terminal
    )
    with ProgressDisplay("listing") as display:
        lease.say = display.say
        with lease, Signals() as signals:
            executor = executor or RayExecutor(job.config, run_id, display.say)
            with signals.interrupting():
                run = Run(job, run_id, lease, signals, display, executor)
            return run.caption()
