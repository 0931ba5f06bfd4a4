"""What a run leaves behind, and what is read from it: records, metrics, tables, figures."""
