"""What a program needs on devices that are not there."""
