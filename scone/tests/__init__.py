"""Laws (property tests) and end-to-end tests; folders mirror the packages."""
