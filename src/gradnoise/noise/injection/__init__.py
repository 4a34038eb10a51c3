"""Noise put into an optimizer's updates or a batch's losses, and its part in a meter's ledger."""
