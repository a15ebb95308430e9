"""What the machine's C compiler builds at its first use, each beside a plain way to the same function."""
