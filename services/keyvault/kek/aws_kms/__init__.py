"""Backend `aws_kms`: KEKs are keys of AWS KMS."""
