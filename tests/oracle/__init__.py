"""The replay oracle: Plimsoll's rules a second time, written from the design alone, and the walk that compares."""
