"""Learned optimizers: update rules whose meta-parameters are trained on families of problems."""
