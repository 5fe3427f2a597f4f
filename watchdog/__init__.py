"""The watchdog: sweeps every account's margin on each mark and on a timer, and records each breach once."""
