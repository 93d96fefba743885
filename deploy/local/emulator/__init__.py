"""Emulator of the three AI providers' real wire formats, for the local stack and tests."""
