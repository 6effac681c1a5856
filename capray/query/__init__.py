"""SQL queries, full-text search and export over a captioning output."""
