"""The captioning job on Ray Data: sources, plan, fetching, the actor, the writer, the lease, and the loop that settles.

Exactly once is computed, never assumed: after the last row the parts are listed afresh and compared with what was wanted.
"""
