"""What a development deployment runs beside the services, in Kubernetes and in Compose."""
