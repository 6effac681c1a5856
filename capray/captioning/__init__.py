"""The captioning job: plan, fetching, actor, writer, lease, and the run that puts them together; on Ray Data (``stream``).
Begin at ``job.caption``.

Exactly once is computed, never assumed: after the last row the parts are listed afresh and compared with what was wanted.
"""
