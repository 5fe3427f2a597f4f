"""A simulation of Plimsoll's own code on real stores, crashed and paused between any two of its steps."""
