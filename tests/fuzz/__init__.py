"""Random damage to every kind of file the program reads; `python -m tests.fuzz --minutes 30` goes on for long."""
