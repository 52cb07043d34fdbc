"""Answers from an adapter: loading its folder, generating, chatting."""
