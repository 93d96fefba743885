"""Images: built from one Dockerfile, listed by content, signed by a key file."""
