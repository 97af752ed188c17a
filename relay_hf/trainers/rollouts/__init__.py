"""Denoises training text step by step: rows, their buffer, noise, and the steps; knows the model, but no Trainer."""
