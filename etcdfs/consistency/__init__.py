"""What may be shown: audits, read barriers, staleness, records that nothing needs.

Knows: when what a mirror holds may be too old or wrong. Does not know: watches' streams, system
calls.
"""
