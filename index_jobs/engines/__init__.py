"""Vector engines, found by name, plug-ins included: vectors by row number in, the rows
nearest to a query out.
"""
