"""GPT-2 Medium's shape in little memory: this package against the usual stack."""
