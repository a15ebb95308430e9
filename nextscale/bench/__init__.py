"""Timing of models as they are used: latency, throughput, memory."""
