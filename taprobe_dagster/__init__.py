"""The Dagster rim: assets, partitions, checks, automation. No arithmetic, no file formats."""
