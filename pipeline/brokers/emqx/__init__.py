"""The bridges to EMQX."""
