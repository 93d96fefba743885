"""What a development overlay runs in the cluster beside the services."""
