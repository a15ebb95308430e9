"""All settings, one file for each part. Needs no torch."""
