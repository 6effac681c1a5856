"""Training on Ray Train: reading, the worker's loop, validation, tracking, and the job around them
(``job.train``, where to begin)."""
