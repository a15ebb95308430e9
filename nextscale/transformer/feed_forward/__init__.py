"""Mixtures of experts: a router decides, one executor works, whoever the router is."""
