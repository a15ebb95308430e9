"""The one trainer, and the tasks it trains."""
