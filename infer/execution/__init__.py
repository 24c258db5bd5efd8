"""What runs on the device; nothing here decides."""
