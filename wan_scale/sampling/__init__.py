"""A finished student to videos, to a folder to load elsewhere, and to a score sheet."""
