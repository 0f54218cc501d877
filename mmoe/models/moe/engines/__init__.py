"""Provides the engines that multiply groups of rows with the weights of their experts, one a file."""
