"""Decisions and formulas: values in, values out."""
