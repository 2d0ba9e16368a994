"""Adapter folders on disk: read, checked, listed, mixed, pushed and pulled."""
