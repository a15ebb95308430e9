"""Images in: reading pictures of every kind, and small data sets in memory."""
