"""Loopback servers for tests: they listen on 127.0.0.1 only and keep everything below one folder."""
