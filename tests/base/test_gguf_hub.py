"""A GGUF file of the Hub's: OWNER/NAME:FILE.gguf."""

import pytest

from tests.bank.loaded import bank_of
from tests.tiny import tiny_model_folder
from xfactor_peft.adapters.mix import Mix
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.errors import XFactorError
from xfactor_peft.export import export
from xfactor_peft.options import LoadOptions

pytest_plugins = ["tests.hub.hub_fixture"]
pytest.importorskip("gguf", reason="the extra gguf is not installed")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    tiny_model_folder("llama", root / "model")
    bank = bank_of(load_base(resolve_model(str(root / "model")), LoadOptions("fp32")), root)
    export(bank, Mix(), "gguf", root / "files" / "q" / "tiny.gguf")
    return root / "files"


def test_one_file_is_downloaded_once_and_then_found(online, repository):
    online.add("owner/tiny-GGUF", repository)
    first = resolve_model("owner/tiny-GGUF:q/tiny.gguf")
    assert (first.reason, first.gguf.name, len(first.revision)) == ("downloaded from the Hub", "tiny.gguf", 40)
    online.close()
    again = resolve_model("owner/tiny-GGUF:q/tiny.gguf", offline=True)
    assert (again.reason, again.gguf, again.revision) == ("in the local cache", first.gguf, first.revision)
    assert load_base(again, LoadOptions("fp32")).identity.revision == first.revision


def test_what_is_not_there_is_refused_in_one_line(online, repository):
    online.add("owner/tiny-GGUF", repository)
    with pytest.raises(XFactorError, match="the repository has no such file"):
        resolve_model("owner/tiny-GGUF:other.gguf")
    with pytest.raises(XFactorError, match="no such repository"):
        resolve_model("owner/none:tiny.gguf")
    with pytest.raises(XFactorError, match="`offline` forbids the network"):
        resolve_model("owner/tiny-GGUF:q/tiny.gguf", offline=True)
