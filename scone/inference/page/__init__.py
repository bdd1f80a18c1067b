"""The page that the server shows: HTML, CSS and JavaScript."""
