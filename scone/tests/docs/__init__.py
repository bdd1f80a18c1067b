"""That the documentation is true: its commands run, its links lead somewhere, its site builds."""
