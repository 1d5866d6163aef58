"""Searches over the settings of training: one YAML file, W&B's sweep format, run by W&B's agents or by Optuna here."""
