"""Compares networks, and what they do under changed routing, as the papers do."""
