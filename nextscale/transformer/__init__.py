"""The next-scale transformer and the parts it is made of."""
