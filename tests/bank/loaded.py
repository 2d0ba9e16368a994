"""Banks that hold adapters already."""

from xfactor_peft.bank.bank import AdapterBank


def bank_of(base, root, *names):
    bank = AdapterBank(base, root)
    for name in names:
        bank.load(name)
    return bank
