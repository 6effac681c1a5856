"""SQL over a captioning output, for those who only ever see the tables."""
