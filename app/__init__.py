"""Plimsoll: a margining service for perpetual futures."""
