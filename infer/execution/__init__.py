"""What runs on the device. Nothing here decides."""
