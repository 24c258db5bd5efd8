"""Rewards: verifiers, one per file, and what runs, combines and watches them."""
