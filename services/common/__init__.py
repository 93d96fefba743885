"""The runtime that the three services share."""
