"""Estimates of time, communication, host memory and scaling. None was validated on GPUs; see constants.yaml."""
