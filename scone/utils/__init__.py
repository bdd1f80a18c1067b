"""What two packages need and no library gives."""
