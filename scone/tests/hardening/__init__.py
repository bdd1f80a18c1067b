"""What must not hurt anybody: damaged and hostile files, kills, full disks, two runs at once."""
