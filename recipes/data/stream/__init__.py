"""Samples of many sources -> one stream that is shuffled, mixed, packed, and knows its position."""
