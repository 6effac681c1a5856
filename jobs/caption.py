"""Caption on the cluster.

    ray job submit --working-dir . -- python jobs/caption.py s3://bucket/photos s3://bucket/captions --model s3://bucket/training/best

Settings are those of `capray caption`: the same flags, and a YAML file with --config.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from capray.cli import run

sys.exit(run(["caption", *sys.argv[1:]]))
