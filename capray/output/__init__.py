"""A captioning output: its folder and the rows in it (``folder``), the proof that it holds what was promised (``verify``),
and copies of it in large parts (``compact``). Knows nothing of Ray, of models, or of how the rows came to be.
"""

from capray.output.folder import (
    MEND_PART,
    Output,
    create_view,
    duckdb_errors,
    duckdb_path,
    first_row,
    open_duckdb,
    parquet_files,
    quoted,
    require_output,
)

__all__ = [
    "MEND_PART",
    "Output",
    "create_view",
    "duckdb_errors",
    "duckdb_path",
    "first_row",
    "open_duckdb",
    "parquet_files",
    "quoted",
    "require_output",
]
