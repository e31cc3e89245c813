"""Helpers that several test modules share. No test lives here, and no test module
imports from another one.
"""
