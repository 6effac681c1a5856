"""Evaluate on the cluster.

    ray job submit --working-dir . -- python jobs/evaluate.py \\
        s3://bucket/captions --references s3://bucket/samples --split dev

Settings are those of `capray evaluate`: the same flags, and a YAML file with --config.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from capray.cli import run

sys.exit(run(["evaluate", *sys.argv[1:]]))
