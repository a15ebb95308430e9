"""Analyses of trained models: expert load, routing, features of the scales, errors of early scales, convergence."""
