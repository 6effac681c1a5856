"""Serve captions on the cluster.

    ray job submit --working-dir . -- python jobs/serve.py --model s3://bucket/training/best --host 0.0.0.0

Settings are those of `capray serve`: the same flags, and a YAML file with --config.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from capray.cli import run

sys.exit(run(["serve", *sys.argv[1:]]))
