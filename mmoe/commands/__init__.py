"""Holds the commands of the command line, and alone prints and parses arguments."""
