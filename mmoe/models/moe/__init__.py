"""Defines layers of experts: router, dispatch, experts, balance, and the statistics of routing."""
