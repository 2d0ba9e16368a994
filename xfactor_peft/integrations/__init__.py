"""This package's objectives inside other people's tools."""
