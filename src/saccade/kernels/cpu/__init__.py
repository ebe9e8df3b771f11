"""The C++ CPU engine (none yet)."""
