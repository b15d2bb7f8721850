"""Tokens to text and text to tokens that matter: exact streaming text, stop words, bad words. No torch."""
