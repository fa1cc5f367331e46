"""Probes that read token sets: attention, MultiMax and rolling MultiMax."""
