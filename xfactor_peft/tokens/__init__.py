"""Which vocabulary entries are meant: rules, the bytes behind a token, token sets."""
