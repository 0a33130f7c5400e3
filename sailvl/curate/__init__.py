"""Data curation: records in, records out."""
