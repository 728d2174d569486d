"""Runners: train, attack, certify and report from Hydra configs."""
