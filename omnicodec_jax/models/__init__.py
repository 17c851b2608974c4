"""What is trained and shipped."""
