"""What makes a machine fast; enters by optimize()."""
