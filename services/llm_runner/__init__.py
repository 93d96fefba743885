"""Runs attempts: a gRPC parent without keys, and one-shot children that hold one each."""
