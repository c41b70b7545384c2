"""What large caches and distant ones are measured with: a slow server of the S3 protocol, plans of millions."""
