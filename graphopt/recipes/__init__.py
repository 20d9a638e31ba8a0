"""Passes and settings in YAML files; the shipped ones lie here."""
