"""One main a verb: wires the packages together."""
