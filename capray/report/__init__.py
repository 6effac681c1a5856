"""One page, with everything in it, about a captioning output or a training."""
