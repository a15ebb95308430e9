"""A rehearsal of GPU code on a machine without a GPU: shapes, types, devices and waits, without numbers."""
